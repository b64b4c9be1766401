"""Tuple states: packed into one tensor for the solve, unpacked for the field and the caller."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuralode.errors import FieldError
from neuralode.ode.solution import State


class Packing:
    """How the parts of a state lie in one tensor; a lone tensor is left as it is.

    Args:
        y0: the state.
        rows: keep dimension 0, the samples, apart: the packed state is [B, D] instead of [N].
    """

    def __init__(self, y0: State, rows: bool = False):
        self.tuple = isinstance(y0, tuple)
        parts = y0 if isinstance(y0, tuple) else (y0,)
        self.shapes = [part.shape for part in parts]
        self.lead = 1 if rows and self.tuple else 0
        self.sizes = [math.prod(shape[self.lead :]) for shape in self.shapes]

    def pack(self, state: State) -> torch.Tensor:
        if not isinstance(state, tuple):
            return state
        return torch.cat([part.reshape(*part.shape[: self.lead], -1) for part in state], dim=-1)

    def unpack(self, packed: torch.Tensor) -> State:
        """The state from [..., D]; leading dimensions, such as times, are kept."""
        if not self.tuple:
            return packed
        lead = packed.shape[:-1]
        ends = itertools.accumulate(self.sizes)
        parts = (packed.narrow(-1, end - size, size) for end, size in zip(ends, self.sizes, strict=True))
        return tuple(part.reshape((*lead, *shape[self.lead :])) for part, shape in zip(parts, self.shapes, strict=True))

    def field(self, field: Callable[..., Any]) -> Callable[..., Any]:
        """The field over packed states."""
        if not self.tuple:
            return field

        def packed(t: torch.Tensor, y: torch.Tensor, *args: Any) -> torch.Tensor:
            dy = field(t, self.unpack(y), *args)
            self.check(dy)
            return self.pack(tuple(dy))

        return packed

    def check(self, dy: Any) -> None:
        """Raises UsageError if dy is not of the shape of the state."""
        parts: Sequence[Any] | None = dy if isinstance(dy, tuple | list) else (dy,)
        if isinstance(dy, tuple | list) != self.tuple or not all(isinstance(p, torch.Tensor) for p in parts or ()):
            raise FieldError(f"the field returned a {type(dy).__name__} for a state of {_shapes(self.shapes)}; {_RULE}")
        given = [part.shape for part in parts or ()]
        if given != self.shapes:
            raise FieldError(f"the field returned {_shapes(given)} for a state of {_shapes(self.shapes)}; {_RULE}")


def has_samples(y0: State) -> bool:
    """Whether all parts of a state have the same number of entries along dimension 0, the samples."""
    parts = y0 if isinstance(y0, tuple) else (y0,)
    return all(part.dim() > 0 and len(part) == len(parts[0]) for part in parts)


def alike(dy: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """dy in the precision of y, which the solve keeps."""
    return dy if dy.dtype == y.dtype else dy.to(y.dtype)


def lasting(dy: torch.Tensor) -> torch.Tensor:
    """dy, or a copy of it if it has been written to: a field may give one buffer of its own at every evaluation.

    A step still needs the earlier slopes when the next one is evaluated.
    """
    return dy.clone() if writes(dy) != 0 else dy


def writes(x: torch.Tensor) -> int | None:
    """How often x's memory has been written to since it was made; None in inference mode, where PyTorch counts none."""
    try:
        return x._version
    except RuntimeError:
        return None


_RULE = "dy/dt has to have the shape of y."


def _shapes(shapes: Sequence[Any]) -> str:
    listed = [tuple(shape) for shape in shapes]
    return f"shape {listed[0] if len(listed) == 1 else tuple(listed)}"
