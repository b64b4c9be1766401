"""What a block's field reaches besides the block's own parameters and buffers, and an operator would not be given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from neuralode.kernels.watch import Watch
from neuralode.ode import Stats


class Others(NamedTuple):
    """Tensors that are not the block's own, as far as can be seen."""

    learned: str
    """The name of one that wants a gradient, or is a parameter and may want one later; empty if there is none."""
    constant: bool
    """Whether there are others, which want none as yet."""
    hidden: bool
    """Whether the field holds or names something besides that cannot be looked at."""


def others_of(block: nn.Module, field: Callable[..., Any]) -> Others:
    """What the field of a block reaches that is not the block's own."""
    watch, own = Watch(field), {id(x) for x in (*block.parameters(), *block.buffers())}
    others = [(name, x) for name, x in _reached(field, watch) if id(x) not in own and _differentiable(x)]
    learned = (str(name) for name, x in others if x.requires_grad or isinstance(x, nn.Parameter))
    return Others(next(learned, ""), bool(others), watch.opaque)


def _reached(field: Callable[..., Any], watch: Watch) -> Iterator[tuple[Any, torch.Tensor]]:
    """Tensors by names of theirs."""
    for module in watch.modules:
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            if x is not None:
                yield f"{name} of {type(module).__name__}", x
    yield from _tensors_in(getattr(field, "__name__", "field"), field)
    for place in watch.places:
        if not isinstance(getattr(place, "owner", None), Stats):  # of an earlier solve
            for name, value in place.before.items():
                yield from _tensors_in(name[-1] if isinstance(name, tuple) else name, value)


def _tensors_in(name: Any, value: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """A tensor, or those in a tuple or a partial call, which are no places of a Watch."""
    if isinstance(value, torch.Tensor):
        yield name, value
    parts = (*value.args, *value.keywords.values()) if isinstance(value, functools.partial) else value
    for part in parts if isinstance(parts, tuple) else ():
        yield from _tensors_in(name, part)


def _differentiable(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()
