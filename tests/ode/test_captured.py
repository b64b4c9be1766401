"""Recorded steps, with the shim in the place of a GPU: what is recorded is then simply done again."""

from __future__ import annotations

import gc
import shutil
import weakref
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import torchdiffeq
from torch import nn
from torch.autograd import forward_ad

import neuralode
from neuralode.kernels.cuda import stages
from neuralode.kernels.cuda.shim import Shim
from neuralode.ode import SolveError, captured, fastest, graphs, solve
from tests.ode.test_fused_engine import draw, leaf

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
SHIM = Shim()
EXACTLY = {"rtol": 1e-8, "atol": 1e-10}
NEARLY = {"rtol": 1e-6, "atol": 1e-8}
"""For the choice of the first step, by a difference of slopes, takes the last digits into account."""


@pytest.fixture(autouse=True)
def on_the_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "machine", lambda: SHIM)
    monkeypatch.setattr(fastest, "RECORDS", {"cpu"})


class Normed(nn.Module):
    """A field that the kernels do not know."""

    def __init__(self, width: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.layer, self.scale = nn.GroupNorm(1, width), nn.Linear(width, width), 1.0
        self.double()

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.scale * torch.tanh(self.layer(self.norm(y))) * torch.cos(t) - 0.3 * y


def outcome(field: Any, y0: torch.Tensor, engine: str, t: Any = (0.0, 2.0), **kwargs: Any) -> tuple[Any, Any, Any]:
    wanted = [x for x in (y0, *field.parameters()) if x.requires_grad]
    solution = solve(field, y0, t, engine=engine, **kwargs)
    gradients = torch.autograd.grad(solution.ys.square().sum(), wanted, allow_unused=True) if wanted else ()
    return solution.ys.detach(), gradients, solution.stats


def same(field: Any, y0: torch.Tensor, engine: str = "captured", **kwargs: Any) -> Any:
    """Compares the third solve, of which the second has recorded the steps, with the stepper's."""
    for _ in range(3):
        ys, gradients, stats = outcome(field, y0, "auto", **kwargs)
    wanted_ys, wanted, by_stepper = outcome(field, y0, "stepper", **kwargs)
    assert stats.engine == engine, stats.reason
    tolerance = EXACTLY if "first_step" in kwargs.get("options", {}) else NEARLY
    torch.testing.assert_close(ys, wanted_ys, **tolerance)
    torch.testing.assert_close(gradients, wanted, **tolerance)
    assert (stats.accepted, stats.rejected) == (by_stepper.accepted, by_stepper.rejected)
    torch.testing.assert_close(stats.step_sizes, by_stepper.step_sizes, rtol=1e-6, atol=0.0)
    return stats


@pytest.mark.parametrize("t", [(0.0, 2.0), (1.0, -1.0)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "dopri8"])
def test_every_method(method: str, t: Any) -> None:
    stats = same(Normed(), leaf(5, 3), t=t, method=method, rtol=1e-3, atol=1e-4, options={"first_step": 0.3})
    assert stats.reason.startswith("not the kernels: ")


@pytest.mark.parametrize("kwargs", [
    {"controller": "PI"}, {"controller": "PID", "rtol": 1e-6, "atol": 1e-7}, {"options": {"first_step": 1.5}},
    {"options": {"safety": 0.8, "ifactor": 4.0, "dfactor": 0.3}}, {"rtol": 1e-9, "atol": 1e-10},
], ids=str)  # fmt: skip
def test_control(kwargs: dict[str, Any]) -> None:
    stats = same(Normed(), leaf(5, 3), **kwargs)
    if "rtol" in kwargs:
        assert stats.accepted > graphs.CHUNK


def test_rejected_steps() -> None:
    field = Normed()
    field.scale = 30.0
    assert same(field, leaf(5, 3), options={"first_step": 1.0}, rtol=1e-6, atol=1e-7).rejected > 0


def test_what_has_no_gradient() -> None:
    field = Normed()
    same(field, draw(5, 3))
    same(field.requires_grad_(False), leaf(5, 3))
    with torch.no_grad():
        for _ in range(3):
            solution = solve(field, draw(5, 3), [0.0, 1.0])
    assert solution.stats.engine == "captured"


TIMES: dict[str, Any] = {
    "many": torch.linspace(0.0, 2.0, 40), "backwards": (2.0, 1.9, 0.4, 0.39, 0.0),
    "in the first step": (0.0, 0.1, 0.2, 2.0), "in the last step": (0.0, 1.95, 1.99, 2.0),
    "at the end of a step": (0.0, 0.3, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_output_times(method: str, t: Any) -> None:
    t = torch.as_tensor(t, dtype=torch.double)
    same(Normed(), leaf(5, 3), t=t, method=method, rtol=1e-3, atol=1e-4, options={"first_step": 0.3})


def test_output_times_without_gradients() -> None:
    field, y0, t = Normed(), draw(5, 3), torch.linspace(0.0, 2.0, 12).double()
    with torch.no_grad():
        for _ in range(3):
            solution = solve(field, y0, t, rtol=1e-9, atol=1e-9)
        wanted = solve(field, y0, t, rtol=1e-9, atol=1e-9, engine="stepper")
    assert solution.stats.engine == "captured"
    torch.testing.assert_close(solution.ys, wanted.ys)


def test_the_slopes_of_a_large_state_are_kept_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_SLOPES", 1)
    assert same(Normed(), leaf(5, 3), t=torch.linspace(0.0, 2.0, 12).double(), rtol=1e-6, atol=1e-7).accepted > 1


def test_times_that_move_from_solve_to_solve() -> None:
    field, y0 = Normed(), leaf(5, 3)
    for end in (1.0, 2.0, 3.0, 1.5):
        t = torch.linspace(0.0, end, 3 + int(end)).double()
        ys, gradients, stats = outcome(field, y0, "auto", t=t)
        wanted_ys, wanted, _ = outcome(field, y0, "stepper", t=t)
        torch.testing.assert_close(ys, wanted_ys, **NEARLY)
        torch.testing.assert_close(gradients, wanted, **NEARLY)
    assert stats.engine == "captured"


def test_images_and_single_precision() -> None:
    class Convolved(nn.Conv2d):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return torch.tanh(super().forward(y))

    field = Convolved(2, 2, 3, padding=1)
    y0 = draw(3, 2, 4, 4).float().requires_grad_()
    for _ in range(3):
        ys, gradients, stats = outcome(field, y0, "auto")
    wanted_ys, wanted, _ = outcome(field, y0, "stepper")
    assert stats.engine == "captured"
    torch.testing.assert_close(ys, wanted_ys)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)


def test_training() -> None:
    losses: dict[str, list[float]] = {"auto": [], "stepper": []}
    for engine, said in losses.items():
        torch.manual_seed(0)
        field = Normed()
        optimizer = torch.optim.Adam(field.parameters(), lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            loss = (solve(field, draw(20, 3), [0.0, 1.0], engine=engine).final - 1).square().mean()
            loss.backward()
            optimizer.step()
            said.append(loss.item())
    assert losses["auto"] == pytest.approx(losses["stepper"], rel=1e-6)


def test_solves_whose_backward_passes_come_later() -> None:
    field, states = Normed(), [leaf(5, 3), leaf(5, 3)]
    same(field, states[0])
    found = [solve(field, y0, [0.0, 2.0]).ys.square().sum() for y0 in states]
    both = torch.autograd.grad(sum(found), states)  # type: ignore[arg-type]
    for y0, gradient in zip(states, both, strict=True):
        torch.testing.assert_close(gradient, outcome(field, y0, "stepper")[1][0], **NEARLY)


@pytest.mark.parametrize("t", [(0.0, 2.0), (0.0, 0.7, 2.0)], ids=["two times", "three times"])
@pytest.mark.parametrize("wrong", ["stage", "stage_bwd", "start_bwd"])
def test_a_recording_that_is_not_the_field_is_noticed(wrong: str, t: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(stages.Stages, wrong)

    def spoilt(self: Any, *args: Any) -> Any:
        found = right(self, *args)
        [x.mul_(1.01) for x in (self.points[-1], self.adjoint, *self.results[:1])]
        return found

    monkeypatch.setattr(stages.Stages, wrong, spoilt)
    assert "its recorded step is not the field's" in same(Normed(), leaf(5, 3), "stepper", t=t).reason


@pytest.mark.parametrize(("kwargs", "why"), [
    ({"t": (0.0, 1.0, 2.0), "method": "dopri8"}, "no output times between steps of 'dopri8'"),
    ({"t": (0.0, 1.0, 2.0), "method": "adaptive_heun"}, "no output times between steps of 'adaptive_heun'"),
    ({"method": "rk4", "step_size": 0.5}, "no method 'rk4'"),
    ({"method": "dop853"}, "no method 'dop853'"), ({"estimates": True}, "no estimates"),
    ({"t": torch.tensor([0.0, 1.0], requires_grad=True)}, "no gradient of the times"),
], ids=["times", "times without a slope at the end", "rk4", "dop853", "estimates", "gradient of times"])  # fmt: skip
def test_what_graphs_cannot_serve(kwargs: dict[str, Any], why: str) -> None:
    assert why in same(Normed(), leaf(5, 3), engine="stepper", **kwargs).reason


def test_failures_are_the_steppers() -> None:
    field, y0 = Normed(), draw(5, 3)
    same(field, y0)
    for _ in range(3):
        with pytest.raises(SolveError, match="max_steps"):
            solve(field, y0, [0.0, 50.0], max_steps=4, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("t", [(0.0, 2.0), (0.0, 0.7, 1.9, 2.0)], ids=["two times", "four times"])
def test_second_derivatives(t: tuple[float, ...]) -> None:
    field, y0 = Normed(), leaf(5, 3)
    same(field, y0, t=t)
    found = []
    for engine in ("auto", "stepper"):
        ys = solve(field, y0, t, engine=engine).ys
        first = torch.autograd.grad(ys.square().sum(), [y0, field.layer.weight], create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(x.square().sum() for x in first), [y0, field.layer.weight])])
    torch.testing.assert_close(*found, **NEARLY)


def test_odeint() -> None:
    field, y0, t = Normed(), leaf(5, 3), torch.tensor([0.0, 1.0]).double()
    for _ in range(3):
        ys = neuralode.odeint(field, y0, t)
    assert captured._known[field].popitem()[1].graphs is not None
    torch.testing.assert_close(ys, torchdiffeq.odeint(field, y0, t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpoint", ["always", "never", 3])
def test_checkpoints(checkpoint: Any) -> None:
    same(Normed(), leaf(5, 3), "stepper" if checkpoint == 3 else "captured", checkpoint=checkpoint)


def test_graphs_go_with_the_field() -> None:
    field = Normed()
    same(field, draw(5, 3))
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None


class Peculiar(Normed):
    """A parameter without use, and a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(3).double())
        self.factor = torch.tensor(1.0).double()

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(t, y) * self.factor


def test_training_with_the_last_loss_still_there() -> None:
    field, losses = Normed(), []
    for _ in range(4):
        solution = solve(field, draw(5, 3), [0.0, 1.0])
        losses.append(solution.ys.square().sum())  # as a graph that is never taken back
    losses[-1].backward()
    assert solution.stats.engine == "captured"
    assert losses[0].grad_fn is not None


def test_parameters_without_use_get_no_gradient() -> None:
    field, y0 = Peculiar(), leaf(5, 3)
    for _ in range(3):
        field.zero_grad()
        stats = _pulled(field, y0)
    assert stats.engine == "captured"
    assert field.unused.grad is None
    assert field.layer.weight.grad is not None


def test_hooks_of_parameters_run_once() -> None:
    field, y0, seen = Peculiar(), leaf(5, 3), []
    field.layer.weight.register_hook(lambda gradient: seen.append(1) or 2 * gradient)
    for _ in range(3):
        field.zero_grad()
        seen.clear()
        stats = _pulled(field, y0)
    assert stats.engine == "captured"
    assert seen == [1]
    found = field.layer.weight.grad
    field.zero_grad()
    solve(field, y0, [0.0, 1.0], engine="stepper", checkpoint="never").ys.square().sum().backward()
    torch.testing.assert_close(found, field.layer.weight.grad, **NEARLY)


def _pulled(field: nn.Module, y0: torch.Tensor) -> Any:
    solution = solve(field, y0, [0.0, 1.0])
    solution.ys.square().sum().backward()
    return solution.stats


def test_activation_checkpointing() -> None:
    field, y0 = Normed(), leaf(5, 3)

    def solved(y: torch.Tensor) -> torch.Tensor:
        return solve(field, y, [0.0, 1.0]).ys

    for _ in range(3):
        ys = torch.utils.checkpoint.checkpoint(solved, y0, use_reentrant=False)
        (gradient,) = torch.autograd.grad(ys.square().sum(), y0)
    wanted = outcome(field, y0, "stepper", t=(0.0, 1.0))[1][0]
    torch.testing.assert_close(gradient, wanted, **NEARLY)


def test_forward_derivatives() -> None:
    field, y0, direction = Normed(), draw(5, 3), draw(5, 3)
    same(field, y0)
    found = []
    for engine in ("auto", "stepper"):
        with torch.no_grad(), forward_ad.dual_level():
            ys = solve(field, forward_ad.make_dual(y0, direction), [0.0, 1.0], engine=engine).ys
            found.append(forward_ad.unpack_dual(ys).tangent)
    torch.testing.assert_close(found[0], found[1])


def test_a_solve_within_a_solve() -> None:
    class Nested(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Normed()

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return solve(self.inner, y, [0.0, 0.1], rtol=1e-6, atol=1e-8).final - y

    y0 = draw(5, 3)
    field = Nested()
    with torch.no_grad():
        found = [solve(field, y0, [0.0, 1.0]).ys for _ in range(4)]
    for ys in found[1:]:
        torch.testing.assert_close(ys, found[0], rtol=1e-5, atol=1e-6)
