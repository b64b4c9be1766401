"""Optimisers that fitting trajectories wants and torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdamThenLBFGS(torch.optim.Optimizer):
    """Adam for the first steps, L-BFGS with a strong-Wolfe line search after them, on full batches.

    Adam finds the valley, where L-BFGS would stop early; L-BFGS follows it, where Adam would zigzag.

    Args:
        params: parameters to optimise.
        lr: step size of Adam.
        adam_steps: steps before the change.
        max_iter, history_size: of each L-BFGS step, as in `torch.optim.LBFGS`.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 0.01,
        adam_steps: int = 300,
        max_iter: int = 20,
        history_size: int = 100,
    ):
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.adam = torch.optim.Adam(params, lr=lr)
        self.lbfgs = torch.optim.LBFGS(
            params, max_iter=max_iter, history_size=history_size, line_search_fn="strong_wolfe",
            tolerance_grad=1e-12, tolerance_change=1e-15,
        )  # fmt: skip
        self.param_groups = self.adam.param_groups  # a scheduler acts on Adam's step size
        self.adam_steps, self.steps = adam_steps, 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` recomputes the loss and its gradient and is required."""
        if closure is None:
            raise ValueError("AdamThenLBFGS needs a closure that recomputes the loss and its gradient.")
        self.steps += 1
        return self.adam.step(closure) if self.steps <= self.adam_steps else self.lbfgs.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "adam": self.adam.state_dict(), "lbfgs": self.lbfgs.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.adam.load_state_dict(state_dict["adam"])
        self.lbfgs.load_state_dict(state_dict["lbfgs"])
        self.param_groups = self.adam.param_groups
