"""The kernels as an engine of `solve`: the stepper's states, gradients and errors, whatever surrounds the solve."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, vmap

from neuralode.errors import UsageError
from neuralode.kernels.library import library, why_not
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import SolveError, SolverConfig, fused_engine, odeint, odeint_adjoint, solve
from neuralode.ode.controllers import Controller
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.methods import METHODS

pytestmark = pytest.mark.skipif(library() is None, reason=why_not())

EXPLICIT = sorted(name for name, method in METHODS.items() if isinstance(method, RungeKutta))
ADAPTIVE = [name for name in EXPLICIT if METHODS[name].adaptive]
T3 = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
EXACTLY, NEARLY = {"rtol": 1e-12, "atol": 1e-12}, {"rtol": 1e-10, "atol": 1e-10}
both_ways = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "per sample"])


def net(features: int = 2, seed: int = 0) -> MLPField:
    torch.manual_seed(seed)
    return MLPField(features, [9, 7], time=True).double()


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaf(*shape: int) -> torch.Tensor:
    return draw(*shape).requires_grad_()


def how(method: str, **kwargs: Any) -> dict[str, Any]:
    steps = {"rtol": 1e-5, "atol": 1e-6} if method in ADAPTIVE else {"step_size": 0.17}
    return {"method": method, **steps, **kwargs}


class Pair(nn.Module):
    """A field of a state in two parts, [B, D - 1] and [B]."""

    def __init__(self, field: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.field, self.factor = field, factor

    def forward(self, t: torch.Tensor, y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        dy = self.field(t, torch.cat([y[0], y[1][:, None]], 1))
        return self.factor * dy[:, :-1], dy[:, -1]


class Counting(nn.Module):
    """A field with arguments, a parameter that is used twice, one that is not used, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused, self.nfe = nn.Parameter(draw(3, 3)), nn.Parameter(draw(1)), 0

    def forward(self, t: torch.Tensor, y: torch.Tensor, scale: Any = 1.0, shift: Any = 0.5) -> torch.Tensor:
        self.nfe += 1
        return scale * torch.tanh((y @ self.weight).sin() @ self.weight + shift) - t * y


def together(ys: Any) -> Any:
    """A loss in which every state at every time counts."""
    parts = ys if isinstance(ys, tuple) else (ys,)
    return sum((x * torch.linspace(0.5, 2, x.numel()).to(x).reshape(x.shape)).sin().sum() for x in parts)


def outcome(engine: str, field: Any, y0: Any, t: Any = (0.0, 1.0), args: Any = (), loss: Any = together,
            **kwargs: Any) -> tuple[Any, list[torch.Tensor], Any]:  # fmt: skip
    """States, gradients of all that requires one, and statistics."""
    given = [*(y0 if isinstance(y0, tuple) else (y0,)), t, *args]
    parameters = list(field.parameters()) if isinstance(field, nn.Module) else []
    wanted = [x for x in (*given, *parameters) if isinstance(x, torch.Tensor) and x.requires_grad]
    solution = solve(field, y0, t, args=args, engine=engine, **kwargs)
    found = torch.autograd.grad(loss(solution.ys), wanted, allow_unused=True) if wanted else []
    gradients = [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]
    return solution.ys, gradients, solution.stats


def agree(found: Any, wanted: Any, **tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or NEARLY))


def same(field: Any, y0: Any, t: Any = (0.0, 1.0), args: Any = (), states: Any = EXACTLY, gradients: Any = NEARLY,
         spare: int = 0, **kwargs: Any) -> Any:  # fmt: skip
    """Compares the engines; the kernels' statistics. The stepper may take `spare` evaluations more."""
    ys, found, stats = outcome("fused", field, y0, t, args, **kwargs)
    wanted_ys, wanted, by_stepper = outcome("stepper", field, y0, t, args, **kwargs)
    torch.testing.assert_close(ys, wanted_ys, **states)
    agree(found, wanted, **gradients)
    assert (stats.engine, stats.accepted, stats.rejected) == ("fused", by_stepper.accepted, by_stepper.rejected)
    if stats.accepted_per_sample is not None:
        assert torch.equal(stats.accepted_per_sample, by_stepper.accepted_per_sample)
        assert torch.equal(stats.rejected_per_sample, by_stepper.rejected_per_sample)
        spare += 1  # the slope at the end
    assert by_stepper.nfe - spare <= stats.nfe <= by_stepper.nfe
    torch.testing.assert_close(stats.step_sizes, by_stepper.step_sizes, rtol=1e-6, atol=1e-12)
    return stats


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.2, 0.1], [0.0, 0.3, 0.31, 1.0], torch.linspace(0, 1, 40).tolist()],
                         ids=["one", "backwards", "some", "many"])  # fmt: skip
@pytest.mark.parametrize("method", EXPLICIT)
def test_every_method(method: str, times: list[float]) -> None:
    if method == "dop853" and len(times) > 2:
        pytest.skip("its dense output is the stepper's")
    same(net(), leaf(5, 2), torch.tensor(times, dtype=torch.float64, requires_grad=True), **how(method))


@pytest.mark.parametrize("method", [m for m in ADAPTIVE if m not in ("dop853", "dopri8")])
@pytest.mark.parametrize("backwards", [False, True])
def test_steps_of_each_sample(method: str, backwards: bool) -> None:
    t = draw(6, 4).abs().cumsum(1)
    t = (t.flip(1) if backwards else t).requires_grad_()
    assert len(same(net(), leaf(6, 2), t, **how(method)).accepted_per_sample) == 6
    same(net(), leaf(6, 2), t[0].detach().requires_grad_(), **how(method, per_sample=True))


@both_ways
@pytest.mark.parametrize("kwargs", [
    {"controller": "PI"}, {"controller": "PID"}, {"controller": Controller(0.5, 0.2, 0.1, safety=0.8, max_factor=4.0)},
    {"options": {"first_step": 0.3}}, {"options": {"first_step": 1e-3, "ifactor": 3.0, "safety": 0.7}},
    {"options": {"first_step": 5.0, "dfactor": 0.5}}, {"rtol": 1e-8, "atol": 1e-8},
], ids=str)  # fmt: skip
def test_control(kwargs: dict[str, Any], by_sample: bool) -> None:
    for t in ([0.0, 4.0], [2.0, 1.1, 0.0]):
        same(net(), 3 * draw(5, 2), t, per_sample=by_sample, states=NEARLY, **kwargs)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("y0", [
    draw(2), draw(1, 2), draw(7, 2), draw(3, 5, 2), draw(2, 3, 4, 2), draw(2, 6).t(), draw(6, 4)[:, ::2],
    draw(6, 1).expand(6, 2), draw(6, 5, 2)[::2], draw(2, 5, 3).permute(2, 1, 0),
], ids=lambda y0: f"{tuple(y0.shape)} by {y0.stride()}")  # fmt: skip
def test_shapes_and_strides(y0: torch.Tensor, method: str) -> None:
    same(net(), y0.detach().requires_grad_(), T3, **how(method))


@pytest.mark.parametrize("method", ["dopri5", "midpoint"])
def test_tuple_states(method: str) -> None:
    a, b = leaf(5, 2), leaf(5)
    check = functools.partial(same, Pair(net(3), 1e2), t=T3, states={"rtol": 1e-11, "atol": 1e-10}, **how(method))
    check((a, b))
    check((a, b), loss=lambda ys: ys[1][-1].sum())
    check((a.detach(), b), loss=lambda ys: ys[0].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frozen", ["nothing", "y0", "weight", "args", "all"])
def test_gradients_of_what_requires_them(dtype: torch.dtype, frozen: str) -> None:
    field, y0, t = Counting().to(dtype), draw(5, 3, dtype=dtype), T3.detach().to(dtype)
    args = (draw(5, 1, seed=2, dtype=dtype), draw(3, seed=3, dtype=dtype))
    groups = {"y0": [y0], "weight": [field.weight], "args": [*args, t]}
    for name, tensors in groups.items():
        for x in tensors:
            x.requires_grad_(frozen not in (name, "all"))
    field.unused.requires_grad_(frozen != "all")
    roughly = {"rtol": 1e-4, "atol": 1e-4}
    close = {} if dtype == torch.float64 else {"states": {"rtol": 1e-5, "atol": 1e-5}, "gradients": roughly}
    same(field, y0, t, args, method="rk4", step_size=0.25, **close)


@both_ways
@pytest.mark.parametrize("loss", [
    lambda ys: ys[-1].sum(), lambda ys: ys.sum(), lambda ys: 0 * ys.sum(), lambda ys: ys[1, 2:4, 0].square().sum(),
    lambda ys: ys[::2].sin().sum(), lambda ys: ys[0].square().sum(), lambda ys: ys.mT.cumsum(0)[1].sin().sum(),
], ids=["last", "expanded", "zero", "partial", "some times", "first", "strided"])  # fmt: skip
def test_cotangents(loss: Any, by_sample: bool) -> None:
    same(net(), leaf(5, 2), T3, loss=loss, per_sample=by_sample)


@both_ways
@pytest.mark.parametrize("budget", [2**31, 0])
def test_rejected_steps_that_overflow_leave_no_trace(by_sample: bool, budget: int) -> None:
    weight = torch.tensor([3.0, 0.1], dtype=torch.float64, requires_grad=True)
    stats = same(lambda t, y, w: -w * y**5, leaf(5, 2), [0.0, 2e3], (weight,), per_sample=by_sample, spare=99,
                 options={"first_step": 2e3}, memory_budget=budget, states=NEARLY)  # fmt: skip
    assert stats.rejected > 2


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("twice", [False, True], ids=["in the field", "in both parts"])
def test_initial_state_that_is_seen_twice(gradients: bool, twice: bool) -> None:
    x = draw(5, 2).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        y0, args = ((x, x), (1.0,)) if twice else ((x, 2 * x), (x,))
        found = [solve(lambda t, y, x: (y[1] * x, -2 * y[0]), y0, T3, args=args, engine=engine).ys
                 for engine in ("auto", "stepper")]  # fmt: skip
    torch.testing.assert_close(*found, **EXACTLY)


@pytest.mark.parametrize("way", [odeint, odeint_adjoint], ids=lambda way: way.__name__)
@pytest.mark.parametrize("method", [None, "rk4", "bosh3"])
@pytest.mark.parametrize("pair", [False, True])
def test_odeint_returns_what_it_did(way: Any, method: str | None, pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, served, run = [], [], fused_engine.run

    def spied(*args: Any) -> Any:
        if len(found) == 1:
            raise fused_engine.NotFused("not in this test")
        served.append(run(*args))
        return served[-1]

    monkeypatch.setattr(fused_engine, "run", spied)
    for _ in range(2):
        inner, y0 = net(), leaf(5, 2)
        ys = way(Pair(inner) if pair else inner, (y0[:, :1], y0[:, 1]) if pair else y0, T3.detach(), method=method)
        found.append([*(ys if pair else (ys,)), *torch.autograd.grad(together(ys), [y0, *inner.parameters()])])
    assert len(served) == (way is odeint)  # the continuous adjoint is the stepper's
    agree(*found)


@pytest.mark.parametrize("output", ["final", "trajectory"])
@pytest.mark.parametrize("augment", [0, 1])
def test_blocks(output: str, augment: int) -> None:
    found = []
    for engine, ran in (("auto", "fused"), ("stepper", "stepper")):
        block = ODEBlock(net(2 + augment), SolverConfig(engine=engine), output=output, augment=augment)
        ys = block(draw(5, 2))
        found.append([ys, *torch.autograd.grad(together(ys), list(block.parameters()))])
        assert block.stats is not None
        assert block.stats.engine == ran
    agree(*found)


@pytest.mark.parametrize(("field", "y0", "reason"), [
    (lambda t, y: y.sort(0).values, draw(5, 2), "sort"), (lambda t, y: y - y.mean(0), draw(5, 2), ""),
    (lambda t, y: y if (y > 0).all() else -y, draw(5, 2), ""),
    (lambda t, y: y * torch.rand_like(y), draw(5, 2), "random"), (lambda t, y: -y, draw(0, 2), "empty"),
    (lambda t, y: -y, draw(5, 2).half(), "precision"), (lambda t, y: -y, draw(3).cfloat(), "precision"),
], ids=["unknown", "mixes rows", "looks", "draws", "empty", "half", "complex"])  # fmt: skip
def test_refusals_have_their_reason(field: Any, y0: torch.Tensor, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"engine='fused' cannot serve this solve: .*{reason}.*give engine='auto'"):
        solve(field, y0, [0.0, 0.1], engine="fused")
    stats = solve(field, y0, [0.0, 0.1], method="rk4", step_size=0.1).stats
    assert (stats.engine, reason in stats.reason) == ("stepper", True)
    assert "program" in solve(net(), draw(5, 2), [0.0, 1.0]).stats.reason


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


NAN = torch.where(torch.arange(8).reshape(4, 2) == 5, math.nan, draw(4, 2))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("field", "y0", "end", "kwargs"), [
    (decay, NAN, 1.0, {}), (decay, NAN, 1.0, {"per_sample": True}),
    (decay, NAN, 1.0, {"method": "rk4", "step_size": 0.5}),
    (lambda t, y: (y - 1).log() - 5, draw(4, 2).abs() + 1.2, 9.0, {}),
    (decay, draw(4, 2), 99.0, {"max_steps": 3}), (decay, draw(4, 2), -99.0, {"max_steps": 3, "per_sample": True}),
    (decay, draw(4, 2), 99.0, {"max_steps": 3, "method": "euler", "step_size": 0.1}),
    (lambda t, y: y**2, draw(4, 2).abs(), 9.0, {}), (lambda t, y: y**2, draw(4, 2).abs(), 9.0, {"per_sample": True}),
    (lambda t, y: y**2, draw(4, 2).abs(), 99.0, {"method": "euler", "step_size": 1.0}),
], ids=["nan", "nan sample", "nan rk4", "log", "steps", "steps sample", "steps euler", "blow-up", "blow-up sample",
        "overflow"])  # fmt: skip
def test_failures_are_the_steppers(field: Any, y0: torch.Tensor, end: float, kwargs: Any, grad: bool) -> None:
    said = []
    for engine in ("stepper", "auto", "fused", "stepper"):  # the stepper measures what a field keeps the first time
        with pytest.raises(SolveError) as caught:
            solve(field, y0.detach().requires_grad_(grad), [0.0, end], engine=engine, **kwargs)
        said.append((str(caught.value), caught.value.status, caught.value.stats.nfe, caught.value.stats.accepted))
    assert said[1] == said[2] == said[3]


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_second_derivatives(method: str) -> None:
    found = []
    for engine in ("fused", "stepper"):
        field, y0 = net(), leaf(3, 2)
        inputs = [y0, T3, *field.parameters()]
        ys = solve(field, y0, T3, engine=engine, **how(method)).ys
        first = torch.autograd.grad(together(ys), inputs, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)])
    agree(*found, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=lambda c: c.__name__)
def test_derivatives_against_differences(check: Any) -> None:
    def final(weight: torch.Tensor, y0: torch.Tensor) -> torch.Tensor:
        return solve(
            lambda t, y: (y @ weight).tanh(), y0, [0.0, 0.5, 1.0], method="rk4", step_size=0.5, engine="fused"
        ).ys

    assert check(final, ((0.3 * draw(2, 2)).requires_grad_(), leaf(2, 2)))


def test_transforms_fall_back() -> None:
    field, y0, engines = net(), draw(4, 2), []

    def final(y: torch.Tensor, parameters: Any = None) -> torch.Tensor:
        f = field if parameters is None else lambda t, y: functional_call(field, parameters, (t, y))
        solution = solve(f, y, [0.0, 1.0], method="rk4", step_size=0.2)
        engines.append(solution.stats.engine)
        return solution.final

    own = dict(field.named_parameters())
    found = [vmap(final)(y0), grad(lambda y: final(y).sin().sum())(y0),
             *grad(lambda p: final(y0, p).sin().sum())(own).values()]  # fmt: skip
    ys = final(y0.requires_grad_())
    assert engines == ["stepper", "stepper", "stepper", "fused"]
    agree(found, [ys, *torch.autograd.grad(ys.sin().sum(), [y0, *own.values()])])


@pytest.mark.parametrize(
    ("engine", "dtype"), [("fused", torch.uint8), ("auto", torch.float64)], ids=["owner", "inputs"]
)
def test_hooks_of_saved_tensors(engine: str, dtype: torch.dtype) -> None:
    with save_on_cpu(), saved_tensors_hooks(lambda x: x.clone() if x.dtype == dtype else x, lambda x: x):
        field = net()
        loss = together(solve(field, draw(5, 2), T3, engine=engine).ys)
    agree(torch.autograd.grad(loss, list(field.parameters())), outcome("fused", field, draw(5, 2), T3)[1][1:])


def test_backward_twice() -> None:
    field = net()
    ys, parameters = solve(field, draw(5, 2), [0.0, 1.0], engine="fused").ys, list(field.parameters())
    one, other = (torch.autograd.grad(together(ys), parameters, retain_graph=True) for _ in range(2))
    agree(one, other, rtol=0, atol=0)
    torch.autograd.grad(together(ys), parameters)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(ys.sum(), parameters)


@pytest.mark.parametrize("what", [0, 1, 2], ids=["parameter", "y0", "args"])
def test_changes_before_the_backward_pass_are_noticed(what: int) -> None:
    field, y0, args = Counting(), draw(5, 3), (draw(1), draw(3))
    loss = solve(field, y0, [0.0, 1.0], args=args, engine="fused").final.sum()
    with torch.no_grad():
        (field.weight, y0, args[1])[what].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use", [
    lambda ys, y0: None, lambda ys, y0: ys.sum().backward(), lambda ys, y0: ys.sum().backward(retain_graph=True),
    lambda ys, y0: torch.autograd.grad(ys.sum(), y0, create_graph=True), lambda ys, y0: ys.mul_(2).sum().backward(),
], ids=["no backward", "backward", "retained", "create_graph", "in place"])  # fmt: skip
def test_memory_goes_with_the_states(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, make = [], fused_engine._kernel_for
    monkeypatch.setattr(fused_engine, "_kernel_for", lambda task: kernels.append(made := make(task)) or made)
    y0 = leaf(5, 2)
    ys = solve(decay, y0, [0.0, 1.0], engine="fused").ys
    gone = weakref.ref(kernels.pop())
    use(ys, y0)
    del ys
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    field, y0 = ODEBlock(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))).double(), draw(5, 2)
    with mode():
        ys, copied = field(y0), y0.clone()
    assert field.stats is not None
    assert (field.stats.engine, ys.requires_grad) == ("fused", False)
    torch.testing.assert_close(ys.clone(), field(y0).detach(), **EXACTLY)
    torch.testing.assert_close(solve(decay, copied, T3).final, solve(decay, y0, T3).final, **EXACTLY)


@pytest.mark.parametrize(("rows", "method"), [(1, "dopri5"), (1, "rk4"), (100_003, "rk4"), (100_003, "bosh3")])
def test_batches(rows: int, method: str) -> None:
    same(net(), leaf(rows, 2), [0.0, 0.2, 0.4], loss=lambda ys: ys[1:].square().mean(), **how(method))


@pytest.mark.parametrize("kwargs", [{}, {"per_sample": True}, {"method": "rk4", "step_size": 0.1}], ids=str)
def test_counters_of_the_field_and_training(kwargs: dict[str, Any]) -> None:
    losses: dict[str, list[float]] = {"fused": [], "stepper": []}
    for engine, said in losses.items():
        field = Counting()
        optimizer = torch.optim.Adam(field.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            solution = solve(field, draw(20, 3), [0.0, 1.0], engine=engine, **kwargs)
            assert field.nfe == solution.stats.nfe > 1 or engine == "stepper"
            field.nfe = 0
            loss = (solution.final - 1).square().mean()
            loss.backward()
            optimizer.step()
            said.append(loss.item())
    assert losses["fused"] == pytest.approx(losses["stepper"], rel=1e-9)
    assert losses["fused"][-1] < losses["fused"][0]
