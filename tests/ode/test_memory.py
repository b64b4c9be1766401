"""What a solve keeps for its backward pass: bytes counted, no clock and no profiler."""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.nn import MLPField
from neuralode.ode import solve
from tests.problems import Counting as CountingField


def mlp(width: int = 64, depth: int = 2) -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [width] * depth)


def batch(rows: int = 256) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))


class Recording(nn.Module):
    """Knows the bytes of those of its hidden activations that a graph holds, and the most that there were at once."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, 2)
        self.graphs = self.now = self.peak = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.second(_Watched.apply(torch.tanh(self.first(y)), self))

    def change(self, graphs: int, size: int) -> None:
        self.graphs += graphs
        self.now += graphs * size
        self.peak = max(self.peak, self.now)


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, field: Recording) -> torch.Tensor:
        ctx.alive = _Alive(field, x.untyped_storage().nbytes())  # for as long as the graph
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Alive:
    def __init__(self, field: Recording, size: int):
        field.change(1, size)
        weakref.finalize(self, field.change, -1, size)


class Seen:
    """dy/dt = rate · y, which remembers the states that it was given for as long as others do."""

    def __init__(self) -> None:
        self.rate = torch.tensor(-0.5, requires_grad=True)
        self.states: list[weakref.ref[torch.Tensor]] = []
        self.most = 0

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.states.append(weakref.ref(y))
        if len(self.states) % 16 == 0:
            self.most = max(self.most, self.alive())
        return self.rate * y

    def alive(self) -> int:
        self.states = [state for state in self.states if state() is not None]
        return len({id(state()) for state in self.states})


class Saved:
    """Bytes that autograd saves, each storage once, parameters left out; use as the hooks of saved tensors."""

    def __init__(self, parameters: Iterable[torch.Tensor]):
        self.left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self.users: Counter[int] = Counter()
        self.now = self.peak = 0

    def pack(self, x: torch.Tensor) -> _Held:
        return _Held(self, x)

    def change(self, key: int, size: int, users: int) -> None:
        if key in self.left_out:
            return
        before = self.users[key] > 0
        self.users[key] += users
        self.now += ((self.users[key] > 0) - before) * size
        self.peak = max(self.peak, self.now)


class _Held:
    def __init__(self, saved: Saved, x: torch.Tensor):
        self.x = x
        storage = x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        saved.change(key, size, 1)
        weakref.finalize(self, saved.change, key, size, -1)


def kept(field: nn.Module, y0: torch.Tensor, **kwargs: Any) -> int:
    """The most bytes that autograd holds at once in one forward and backward pass."""
    saved = Saved(field.parameters())
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.x):
        solve(field, y0, [0.0, 1.0], engine="stepper", **kwargs).final.square().sum().backward()
    return saved.peak


RK4 = {"method": "rk4", "step_size": 0.01}


def test_always_needs_a_small_part_of_the_memory_of_never() -> None:
    everything = kept(mlp(), batch(), checkpoint="never", **RK4)
    assert everything > 50e6, "100 steps of 4 evaluations, each keeping two activations of [256, 64] floats"
    field = Seen()
    solve(field, batch(), [0.0, 1.0], checkpoint="always", **RK4).final.sum().backward()
    states = field.most * batch().numel() * 4  # which are saved by us, not by autograd
    assert kept(mlp(), batch(), checkpoint="always", **RK4) + states <= everything / 5


@pytest.mark.parametrize("policy", ["always", 4, "auto"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "esdirk4"])
def test_memory_does_not_grow_with_the_activations_of_the_field(method: str, policy: Any) -> None:
    step = 0.02 if method == "rk4" else None
    for width in (8, 256):
        field, y0 = Recording(width), batch(16).requires_grad_()
        final = solve(
            field, y0, [0.0, 1.0], method=method, step_size=step, rtol=1e-6, atol=1e-6, checkpoint=policy,
            memory_budget=1,
        ).final  # fmt: skip
        gc.collect()
        # `auto` begins with the graph of one step
        assert field.graphs <= (12 if policy == "auto" else 0)
        field.peak = 0
        final.sum().backward()
        assert 0 < field.peak <= 30 * 16 * 4 * width, "graphs of more than a step or two at once"


def test_never_keeps_the_activations() -> None:
    field = Recording(32)
    final = solve(field, batch(16), [0.0, 1.0], method="rk4", step_size=0.02, checkpoint="never").final
    assert field.now == 200 * 16 * 4 * 32
    assert final.requires_grad


@pytest.mark.parametrize("policy", ["always", "never", 3])
def test_nothing_is_kept_once_the_solution_is_gone(policy: Any) -> None:
    field = Recording(32)
    solution = solve(field, batch(16).requires_grad_(), [0.0, 1.0], **RK4, checkpoint=policy)
    solution.final.sum().backward()
    del solution
    gc.collect()
    assert field.now == 0
    assert field.peak > 0


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    field = Seen()
    with torch.no_grad():
        solve(field, batch(16), [0.0, 1.0], **RK4)
    assert field.most <= 4


LONG = {"method": "euler", "step_size": 1 / 2000}


@pytest.mark.parametrize("limit", [2, 8, 32])
def test_a_number_of_checkpoints_bounds_the_states_that_are_kept(limit: int) -> None:
    field = Seen()
    final = solve(field, torch.ones(3, 5), [0.0, 1.0], checkpoint=limit, **LONG).final
    assert field.alive() <= limit + 2
    field.most = 0
    final.sum().backward()
    # about `limit` states on each level of the recursion, which has log(steps)/log(limit) of them
    assert field.most <= (limit + 2) * (2 + math.log(2000) / math.log(limit))


def test_always_keeps_one_state_a_step() -> None:
    field = Seen()
    final = solve(field, torch.ones(3, 5), [0.0, 1.0], checkpoint="always", **LONG).final
    assert 1990 < field.alive() <= 2002
    assert final.requires_grad


def test_the_work_of_a_number_of_checkpoints_stays_bounded() -> None:
    for steps, limit, most in ((64, 8, 3.5), (2000, 50, 3.5), (128, 2, 9.0)):
        field = CountingField(MLPField(2, [4]))
        final = solve(field, batch(2), [0.0, 1.0], method="euler", step_size=1 / steps, checkpoint=limit).final
        forward = field.calls
        assert forward <= steps + 1
        final.sum().backward()
        assert field.calls - forward <= most * steps
        assert field.vjps == steps


@pytest.mark.parametrize(("budget", "recomputes"), [(2**31, False), (200_000, True), (1, True)])
def test_auto_recomputes_beyond_its_budget(budget: int, recomputes: bool) -> None:
    field = Recording(64)
    calls: list[bool] = []
    field.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    final = solve(field, batch(16), [0.0, 1.0], **RK4, checkpoint="auto", memory_budget=budget).final
    forward = len(calls)
    assert (False in calls) == recomputes
    assert field.now <= 1.5 * budget + 40_000
    if budget == 200_000:
        assert field.now > budget / 6, "the budget is there to be used"
    final.sum().backward()
    assert (len(calls) > forward) == recomputes


def test_a_budget_holds_for_the_field_that_it_is_used_with() -> None:
    # a wide field uses up the same budget in fewer steps than a narrow one of the same class and state
    with_graph = []
    for width in (8, 256):
        field = Recording(width)
        final = solve(field, batch(16), [0.0, 1.0], **RK4, memory_budget=150_000).final
        with_graph.append(field.graphs)
        del final
    assert with_graph[0] > 4 * with_graph[1]


@pytest.mark.parametrize("frozen", ["all", "first"])
@pytest.mark.parametrize("module", [True, False])
def test_a_budget_holds_for_a_field_that_was_frozen_before(frozen: str, module: bool) -> None:
    with_graph = []
    for before in (False, True):
        field = Recording(64)
        used = field if module else lambda t, y, field=field: field(t, y)
        if before:
            (field if frozen == "all" else field.first).requires_grad_(False)
            solve(used, batch(16), [0.0, 1.0], method="rk4", step_size=0.5)
            field.requires_grad_(True)
        final = solve(used, batch(16), [0.0, 1.0], **RK4, memory_budget=150_000).final
        with_graph.append(field.graphs)
        del final
    assert with_graph[0] == with_graph[1] < 60
