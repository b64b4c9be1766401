"""Which tensors a field depends on: found by themselves, held fast for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from neuralode.errors import UsageError
from neuralode.ode.solution import State


class HeldField:
    """A field together with the tensors that it had when the solve began.

    A module's parameters and buffers are captured, so that a backward pass that evaluates the field again uses the
    very tensors of the forward pass, also where `functional_call` had swapped them in for the time of the call only.
    """

    def __init__(self, field: Callable[..., Any], args: Sequence[Any]):
        self.field, self.args = field, tuple(args)
        self.module = field if isinstance(field, nn.Module) else None
        self.captured: dict[str, torch.Tensor] = {}
        if self.module is not None:
            self.captured = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        self._rebind: bool | None = None

    @property
    def registered(self) -> list[torch.Tensor]:
        """The module's tensors and the tensor arguments that require a gradient."""
        arguments = [a for a in self.args if isinstance(a, torch.Tensor)]
        return [x for x in (*self.captured.values(), *arguments) if x.requires_grad]

    def __call__(self, t: torch.Tensor, y: State) -> Any:
        """The field as it was: for the backward pass."""
        if self._rebind is None:
            self._rebind = self._has_changed()
        if self._rebind:
            assert self.module is not None
            return functional_call(self.module, self.captured, (t, y, *self.args))
        return self.field(t, y, *self.args)

    def release(self) -> None:
        """Says that a backward pass begins: the module may hold other tensors by now."""
        self._rebind = None

    def _has_changed(self) -> bool:
        if self.module is None:
            return False
        now = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return any(now.get(name) is not tensor for name, tensor in self.captured.items())

    def all_inputs(self, evaluate: Callable[[], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Every tensor besides t and y that the field sends a gradient to, `registered` first; and dy/dt.

        Looks at the graph of one evaluation, so that the parameters of a function that is no module are found too.

        Args:
            evaluate: evaluates the field at a time and a state that carry no gradient.

        Raises:
            UsageError: if the field uses a tensor computed outside it from something that requires a gradient, which
                no later evaluation could reach.
        """
        known = self.registered
        with torch.enable_grad():
            marker = torch.zeros((), requires_grad=True) + 0
            dy = evaluate()
        found = {id(x) for x in known}
        return known + [x for x in _leaves(dy, known, marker.grad_fn) if id(x) not in found], dy.detach()


def _leaves(dy: torch.Tensor, known: list[torch.Tensor], marker: Any) -> list[torch.Tensor]:
    """The leaves of the graph of dy, not looking past the tensors in `known`."""
    stops = {x.grad_fn for x in known if x.grad_fn is not None}
    leaves: list[torch.Tensor] = []
    pending, seen = [dy.grad_fn], set(stops)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        elif node._sequence_nr() < marker._sequence_nr():
            raise UsageError(
                "the field uses a tensor that was computed outside it from others that require a gradient, and "
                "recomputing the field could not reach those; hand the tensor over through args=(...), or give "
                "checkpoint='never'."
            )
        else:
            pending.extend(child for child, _ in node.next_functions)
    return leaves
