"""Fields that a call leaves as they were: only of such a field may a recording stand for a call."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        if any(x.layout is not torch.strided or x.is_inference() for x in self.tensors):
            raise NotCaptured("it holds a tensor that is sparse or was made in inference mode")
        self._memory = [x.detach() for x in self.tensors]  # what a recording reads has to stay
        self._as_recorded = self._numbers()

    def holds(self) -> bool:
        """Whether the field is as it was."""
        return self.known.holds() and self._as_recorded == self._numbers()

    def _numbers(self) -> list[Any]:
        """Where its tensors lie, for a recording reads them there, and whether they want a gradient; the values of
        numbers on the host, which a recording takes in."""
        return [
            (x.data_ptr(), x.requires_grad, x.item() if x.dim() == 0 and x.device.type == "cpu" else None)
            for x in self.tensors
        ]


def unchanging(field: Field, t: float, y0: torch.Tensor) -> Unchanging:
    """Evaluates the field once, at the start of a solve, to see that this changes nothing.

    Raises:
        NotCaptured: if it does.
    """
    watch = Watch(field)
    if reason := watch.obstacle():
        raise NotCaptured(reason)
    if watch.draws:
        raise NotCaptured("it may draw random numbers")
    if watch.opaque:
        raise NotCaptured("it names or holds what cannot be looked at")
    found = Unchanging(watch)
    versions, drawn = [x._version for x in found.tensors], generators_of(y0.device)
    buffers = [x.detach().clone() for x in found.buffers]
    time, y = y0.new_full((), t), y0.detach().clone()
    reads = _Reads([time, y], watch.held())
    with torch.no_grad(), reads:
        dy = field(time, y)
    reason = watch.changes()
    if watch.counters:
        reason = f"a call changes {watch.counters[0].name!r}"
    if reason:
        watch.restore()
    elif versions != [x._version for x in found.tensors]:
        reason = "a call changes a tensor that the field holds"
        for buffer, before in zip(found.buffers, buffers, strict=True):
            buffer.data.copy_(before)
    elif not all(map(torch.equal, drawn, generators_of(y0.device))):
        reason = "it draws random numbers"
    elif reads.foreign:
        reason = "it reads a tensor that it does not hold"
    elif not isinstance(dy, torch.Tensor) or (dy.shape, dy.dtype, dy.device) != (y0.shape, y0.dtype, y0.device):
        reason = "it does not return what the state is"
    if reason:
        raise NotCaptured(reason)
    return found


class _Reads(TorchDispatchMode):
    """Sees whether an evaluation reads tensors besides those that it is given, that it holds, or that it makes."""

    def __init__(self, given: list[torch.Tensor], held: set[int]):
        super().__init__()
        self._kept, self._known, self.foreign = given, held | {id(x) for x in given}, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func is torch.ops.aten.lift_fresh.default:  # a constant of the field's code
            self._take(given)
        self.foreign |= any(id(x) not in self._known for x in given)
        out = func(*args, **(kwargs or {}))
        self._take([x for x in tree_leaves(out) if isinstance(x, torch.Tensor)])
        return out

    def _take(self, tensors: list[torch.Tensor]) -> None:
        self._kept += tensors  # as long as they are there, no other tensor has their ids
        self._known |= {id(x) for x in tensors}


def generators_of(device: torch.device) -> list[torch.Tensor]:
    """Where PyTorch's generators stand, of which a field on the device may draw."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
