"""Evaluating a module that somebody else is training, and leaving no trace."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_LARGE = 2**20
"""Entries of a tensor attribute beyond which it is taken for data, which no forward pass changes."""


class Frozen:
    """What a module holds besides its weights, to be put back after each evaluation and at the end.

    Buffers, the attributes of every submodule (modes, counters, statistics of a solve; lists, dicts, sets and tensors
    with their contents, one level deep) and the random states. While it is in force batch norms use their running
    statistics, or with `own_statistics` those of the batch, and every evaluation draws the same random numbers, so that
    the loss is a function of the weights alone.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], seed: int, own_statistics: bool = False):
        self.parameters, self.seed = parameters, seed
        self._weights = [p.data for p in parameters]
        self._attributes = [(part, dict(part.__dict__), dict(part._buffers)) for part in module.modules()]
        values = [value for _, attributes, _ in self._attributes for value in attributes.values()]
        held = [b for _, _, buffers in self._attributes for b in buffers.values() if b is not None]
        held += [x for x in values if isinstance(x, torch.Tensor) and x.numel() <= _LARGE]
        self._contents = [(b, b.detach().clone()) for b in held]
        # what a forward pass adds to or takes from, such as a metric's list of results
        self._containers = [(value, copy.copy(value)) for value in values if isinstance(value, list | dict | set)]
        self._devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
        for part in module.modules():
            if isinstance(part, _BatchNorm) and part.track_running_stats and not own_statistics:
                part.training = False

    @contextlib.contextmanager
    def at(self, theta: torch.Tensor) -> Iterator[None]:
        """The module with a copy of the weights θ, [P], inside the block."""
        theta, offset = theta.clone(), 0  # some layers write to their weights, as nn.Embedding with max_norm does
        for p, weight in zip(self.parameters, self._weights, strict=True):
            p.data = theta[offset : offset + weight.numel()].view(weight.shape)
            offset += weight.numel()
        self.draw_again()
        try:
            yield
        finally:
            for p, weight in zip(self.parameters, self._weights, strict=True):
                p.data = weight
            self._restore_buffers()

    def draw_again(self) -> None:
        """Starts every generator that is put back anew.

        Not by `torch.manual_seed`, which seeds every device, also those whose states are not put back.
        """
        torch.default_generator.manual_seed(self.seed)
        for device in self._devices:
            torch.cuda.default_generators[device].manual_seed(self.seed)
        np.random.seed(self.seed % 2**32)  # noqa: NPY002
        random.seed(self.seed)

    def _restore_buffers(self) -> None:
        for part, _, buffers in self._attributes:
            if part._buffers.keys() != buffers.keys():  # a cache registered on first use
                part._buffers.clear()
            part._buffers.update(buffers)
        for buffer, content in self._contents:
            buffer.data.copy_(content)  # whatever its version says: `buffer.data.mul_()` leaves that as it is

    def restore(self) -> None:
        """Puts everything back."""
        self._restore_buffers()
        for part, attributes, _ in self._attributes:
            for name in part.__dict__.keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)
        for container, content in self._containers:
            if isinstance(container, list):
                container[:] = content
            elif isinstance(container, set) or not _same_items(container, content):
                container.clear()
                container.update(content)


@contextlib.contextmanager
def frozen(
    module: nn.Module, parameters: Sequence[nn.Parameter], seed: int, own_statistics: bool = False
) -> Iterator[Frozen]:
    """`Frozen` for the length of a block; the random states of torch, NumPy and Python are put back as well."""
    state = Frozen(module, parameters, seed, own_statistics)
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    device = parameters[0].device.type
    try:
        with torch.random.fork_rng(state._devices), torch.autocast(device, enabled=False), _ordinary_tensors():
            yield state
    finally:
        state.restore()
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def _ordinary_tensors() -> contextlib.AbstractContextManager[Any]:
    """Leaves inference mode, which has no gradients: validation may run in it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def _same_items(a: dict[Any, Any], b: Any) -> bool:
    return len(a) == len(b) and all(x is y and v is w for (x, v), (y, w) in zip(a.items(), b.items(), strict=True))


def flatten(tensors: Sequence[Any], like: Sequence[torch.Tensor]) -> torch.Tensor:
    """One vector [P] of tensors, a None counting as zeros of the shape of its companion in `like`."""
    parts = [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]
    return torch.cat([part.detach().reshape(-1) for part in parts])
