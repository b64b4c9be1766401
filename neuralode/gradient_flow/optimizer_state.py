"""An optimiser's state as vectors over θ: captured, stepped by a replica, read by the flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from neuralode.gradient_flow.frozen import flatten
from neuralode.gradient_flow.update_rule import moving

_NOT_COPIED = {"params", "fused", "foreach", "capturable", "differentiable"}


@dataclass
class OptimizerState:
    """Class, settings and state of an optimiser at one moment; entries of a group follow its part of θ."""

    cls: type[torch.optim.Optimizer]
    settings: list[dict[str, Any]]
    """Hyper-parameters of each group."""
    states: list[dict[str, Any]]
    """For each group what torch keeps for a parameter: vectors over its part of θ, and numbers such as `step`."""
    sizes: list[int]
    """Entries of θ in each group; they sum to P."""

    def vector(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A part of the state over all of θ, [P]; zeros where it has not begun."""
        parts = [
            state[name].to(like) if isinstance(state.get(name), torch.Tensor) else like.new_zeros(size)
            for state, size in zip(self.states, self.sizes, strict=True)
        ]
        return torch.cat(parts)

    @property
    def steps(self) -> float:
        """Steps that the optimiser has counted; SGD counts none."""
        return max((float(state.get("step", 0.0)) for state in self.states), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"cls": self.cls.__name__, "settings": self.settings, "states": self.states, "sizes": self.sizes}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> OptimizerState:
        """The state that `state_dict` gave."""
        return cls(**{**saved, "cls": getattr(torch.optim, saved["cls"])})


def capture(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """A copy of an optimiser's state, flattened group by group. It belongs to an element-wise optimiser."""
    settings, states, sizes = [], [], []
    for group, parameters in zip(optimizer.param_groups, moving(optimizer), strict=True):
        # a learning rate may be a tensor, which schedulers change in place
        settings.append({k: _plain(v) for k, v in group.items() if k not in _NOT_COPIED})
        sizes.append(sum(p.numel() for p in parameters))
        states.append(_joined([optimizer.state.get(p, {}) for p in parameters], parameters))
    # of a subclass the part that torch knows, which is what its flow is known of
    known = next((c for c in type(optimizer).__mro__ if c in vars(torch.optim).values()), type(optimizer))
    return OptimizerState(known, settings, states, sizes)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _joined(states: Sequence[Any], parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for state in states for name, value in state.items() if value is not None):
        values = [state.get(name) for state in states]
        if name == "step":
            joined[name] = max(float(value) for value in values if value is not None)
        else:
            joined[name] = flatten(values, parameters)
    return joined


class Replica:
    """The optimiser again, over θ as one vector: the same class, the same state, gradients of our choosing.

    Element-wise optimisers do to the concatenation of the weights what they do to each weight, so that torch's own
    code takes the steps and nothing is written twice.

    Args:
        theta: the start, [P].
        state: as `capture` gave it.
    """

    def __init__(self, theta: torch.Tensor, state: OptimizerState):
        self._parts = [part.detach().clone().requires_grad_() for part in theta.split(state.sizes)]
        groups = [{**settings, "params": [part]} for settings, part in zip(state.settings, self._parts, strict=True)]
        self._optimizer: torch.optim.Optimizer = state.cls(groups)  # type: ignore[call-arg]
        for part, known in zip(self._parts, state.states, strict=True):
            if known:
                self._optimizer.state[part] = {
                    name: torch.tensor(value) if name == "step" else _copy(value) for name, value in known.items()
                }

    @property
    def theta(self) -> torch.Tensor:
        """The weights now, a copy, [P]."""
        return torch.cat([part.detach() for part in self._parts])

    def step(self, gradient: torch.Tensor, lrs: Sequence[float] | None = None) -> torch.Tensor:
        """One step along a gradient [P], at these learning rates of the groups; the new weights, [P]."""
        for i, (part, slope) in enumerate(
            zip(self._parts, gradient.split([p.numel() for p in self._parts]), strict=True)
        ):
            part.grad = slope.clone()
            if lrs is not None:
                self._optimizer.param_groups[i]["lr"] = lrs[i]
        self._optimizer.step()
        return self.theta


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
