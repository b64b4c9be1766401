"""How much memory the kept graphs of a solve may take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neuralode.ode.rows import Loop

_BYTES: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()
"""Bytes that one evaluation's graph holds, by field, and by the state's kind and what wants a gradient."""


class MemoryBudget:
    """Ends the keeping of graphs when they have taken their share of memory.

    What one evaluation keeps is measured once for each field and kind of state, at the solve's first evaluation.
    """

    def __init__(self, budget: int, field: Callable[..., Any], integration: Loop):
        self.integration, self.budget = integration, budget
        y = integration.y
        trained = tuple(p.requires_grad for p in field.parameters()) if isinstance(field, nn.Module) else ()
        key = (y.shape, y.dtype, y.device, y.requires_grad, trained)
        state = y.numel() * y.element_size()
        try:
            known = _BYTES.setdefault(field, {})
        except TypeError:  # not every callable can be referred to weakly
            known = {}
        # others' hooks, as activation checkpointing has them, must see the same in every solve: nothing is measured
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        # that nothing is kept is not remembered: what a function calls may be trained later
        if not hooked and not known.get(key):
            known[key] = _bytes_kept_by(integration.slope, state)
        self.each = (_GUESS * state if hooked else known[key]) + 2 * state

    def suffices(self, evaluations: float) -> bool:
        """Whether so many evaluations keep within the budget."""
        return evaluations * self.each <= self.budget

    def exhausted(self) -> bool:
        return self.integration.in_graph * self.each > self.budget


_GUESS = 64
"""States that a graph is taken to hold where it cannot be measured."""


def _unchanged(saved: tuple[torch.Tensor, int]) -> torch.Tensor:
    """What autograd checks by itself where no hook stands between."""
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            f"of shape {tuple(x.shape)} that the field used."
        )
    return x


def _bytes_kept_by(evaluation: Callable[[], torch.Tensor], state: int) -> int:
    """Bytes that the graph of an evaluation keeps alive, parameters and inputs not counted; the state has `state`."""
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        if not x.is_leaf:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x, x._version

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unchanged):
            evaluation()
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        evaluation()  # the field uses torch.func, which does not bear to be watched
        return _GUESS * state
    return sum(sizes.values())
