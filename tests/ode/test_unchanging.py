"""Which fields may be recorded, and when they are recorded again; the shim is in the place of a GPU."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.ode import captured, solve
from neuralode.ode.packing import Packing
from neuralode.ode.setup import settings_of
from neuralode.ode.solver_config import SolverConfig
from tests.ode.test_captured import NEARLY, Normed, Peculiar, on_the_shim, outcome, same
from tests.ode.test_fused_engine import draw, leaf

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
__all__ = ["on_the_shim"]  # a fixture


def _swap(field: Normed) -> None:
    field.layer.weight.data = field.layer.weight.data * 2


def _exchange(field: Normed) -> None:
    field.layer = nn.Linear(3, 3).double()


def _rescale(field: Normed) -> None:
    field.scale = 0.1


def _update(field: Normed) -> None:
    with torch.no_grad():
        field.layer.weight.mul_(3)


def _freeze(field: Normed) -> None:
    field.layer.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [_swap, _exchange, _rescale, _update, _freeze])
def test_a_field_that_changes_is_recorded_again(change: Callable[[Normed], None]) -> None:
    field, y0 = Normed(), leaf(5, 3)
    same(field, y0)
    change(field)
    ys, gradients, stats = outcome(field, y0, "auto")
    wanted_ys, wanted, _ = outcome(field, y0, "stepper")
    assert stats.engine == "captured"
    torch.testing.assert_close(ys, wanted_ys, **NEARLY)
    torch.testing.assert_close(gradients, wanted, **NEARLY)


class Counts(Normed):
    nfe = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        return super().forward(t, y)


class Drops(Normed):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(t, nn.functional.dropout(y, 0.5, training=True))


class Batched(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()  # type: ignore[assignment]


@pytest.mark.parametrize(("field", "why"), [
    (Counts(), "a call changes 'nfe'"), (Drops(), "draws random numbers"), (Batched(), "a call changes a tensor"),
], ids=["counts", "drops", "batched"])  # fmt: skip
def test_fields_that_calls_change(field: nn.Module, why: str) -> None:
    y0 = draw(5, 3)
    for _ in range(2):
        solve(field, y0, [0.0, 1.0])
    buffers = [x.clone() for x in field.buffers()]
    next(iter(captured._known[field].values())).obstacle = ""  # so that it is tried again
    with pytest.raises(captured.NotCaptured, match=why):
        captured._graphs_of(field, y0, *_settings(), (0.0, 1.0))
    torch.testing.assert_close(list(field.buffers()), buffers)
    solution = solve(field, y0, [0.0, 1.0])
    assert solution.stats.engine == "stepper"
    assert why in solution.stats.reason


def _settings() -> tuple[Any]:
    return (settings_of(SolverConfig(), Packing(draw(1)), None, keep_dense=False),)


def test_numbers_on_the_host_are_looked_at() -> None:
    field, y0 = Peculiar(), draw(5, 3)
    same(field, y0)
    field.factor.fill_(0.5)
    same(field, y0)


@functools.cache
def shift() -> torch.Tensor:
    return torch.ones(3).double()


def test_tensors_that_the_field_does_not_hold() -> None:
    class Shifted(Normed):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(t, y) + shift()

    assert "a tensor that it does not hold" in same(Shifted(), leaf(5, 3), "stepper").reason


def test_sparse_tensors() -> None:
    class Sparse(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("graph", torch.eye(5).double().to_sparse())

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(t, torch.sparse.mm(self.graph, y))

    assert "sparse" in same(Sparse(), leaf(5, 3), "stepper").reason


def test_a_field_is_tried_where_the_solve_is() -> None:
    class Ranged(Normed):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if t < 0.99 or y.abs().max() > 100:
                raise ValueError("outside")
            return super().forward(t, y)

    assert same(Ranged(), leaf(5, 3), t=(1.0, 3.0)).engine == "captured"


def test_a_field_that_changes_each_time_is_given_up() -> None:
    field, y0 = Normed(), draw(5, 3)
    for n in range(8):
        field.scale = 1.0 + n / 10
        ys, _, stats = outcome(field, y0, "auto")
    assert "changes from solve to solve" in stats.reason
    torch.testing.assert_close(ys, outcome(field, y0, "stepper")[0])
