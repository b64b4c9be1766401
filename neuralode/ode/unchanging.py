"""Fields that a call leaves as they were: only of such a field may a recording stand for a call."""

from __future__ import annotations

import torch

from neuralode.kernels.recall import Remembered
from neuralode.kernels.watch import Watch
from neuralode.ode.observed_field import Field


class NotCaptured(Exception):
    """A solve cannot be served by recorded steps; the message says why."""


class Unchanging:
    """A field that a call leaves as it was: how to tell whether it still is so, and the tensors that it holds."""

    def __init__(self, watch: Watch):
        self.known = Remembered(watch, None, None, [])
        self.buffers = [x for module in watch.modules for x in module._buffers.values() if x is not None]
        parameters = (x for module in watch.modules for x in module._parameters.values())
        others = (x for place in watch.places for x in place.before.values())
        self.tensors = [x for x in (*self.buffers, *parameters, *others) if isinstance(x, torch.Tensor)]

    def addresses(self) -> list[tuple[int, bool]]:
        """Where its tensors lie, for a graph reads them there, and whether they want a gradient."""
        return [(x.data_ptr(), x.requires_grad) for x in self.tensors]


def unchanging(field: Field, y0: torch.Tensor) -> Unchanging:
    """Evaluates the field once, to see that this changes nothing.

    Raises:
        NotCaptured: if it does.
    """
    watch = Watch(field)
    if reason := watch.obstacle():
        raise NotCaptured(reason)
    if watch.draws:
        raise NotCaptured("it may draw random numbers")
    found = Unchanging(watch)
    versions, generators = [x._version for x in found.tensors], _generators(y0.device)
    buffers = [x.detach().clone() for x in found.buffers]
    with torch.no_grad():
        dy = field(y0.new_zeros(()), y0.detach().clone())
    reason = watch.changes()
    if watch.counters:
        reason = f"a call changes {watch.counters[0].name!r}"
    if reason:
        watch.restore()
    elif versions != [x._version for x in found.tensors]:
        reason = "a call changes a tensor that the field holds"
        for buffer, before in zip(found.buffers, buffers, strict=True):
            buffer.data.copy_(before)
    elif not all(map(torch.equal, generators, _generators(y0.device))):
        reason = "it draws random numbers"
    elif not isinstance(dy, torch.Tensor) or (dy.shape, dy.dtype) != (y0.shape, y0.dtype):
        reason = "it does not return what the state is"
    if reason:
        raise NotCaptured(reason)
    return found


def _generators(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
