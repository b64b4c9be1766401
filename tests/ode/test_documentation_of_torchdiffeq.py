"""What torchdiffeq's documentation shows, in short: run with it and with ours, for the same numbers and refusals."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import nn

import neuralode

BOTH = (torchdiffeq, neuralode)
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"]
FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams"]

Solver = types.ModuleType


class Spiral(nn.Module):
    """The field of the demo: a small network of the cubes of the state."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y**3)


def numbers(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def same(use: Callable[[Solver], Any], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Runs a program with either package and compares what it gives."""
    theirs, ours = (use(package) for package in BOTH)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def available(*names: str) -> list[str]:
    from torchdiffeq._impl.odeint import SOLVERS  # which methods there are differs between its releases

    return [name for name in names if name in SOLVERS]


@pytest.mark.parametrize("method", available(*ADAPTIVE))
def test_adaptive_methods(method: str) -> None:
    t = torch.linspace(0, 2, 7, dtype=torch.float64)
    same(
        lambda d: d.odeint(Spiral(), numbers(2.0, 0.5), t, method=method, rtol=1e-6, atol=1e-7),
        # both stay within their tolerances by steps of their own; fehlberg2 steps far beyond it
        *((1e-3, 1e-3) if method == "fehlberg2" else (1e-3, 1e-4)),
    )


@pytest.mark.parametrize("options", [None, {"step_size": 0.07}, {"step_size": 0.07, "perturb": True}], ids=str)
@pytest.mark.parametrize("method", available(*FIXED))
def test_fixed_step_methods(method: str, options: dict[str, Any] | None) -> None:
    t = torch.linspace(0, 2, 20, dtype=torch.float64)
    own = {**(options or {}), "max_order": 4} if "adams" in method else options
    same(lambda d: d.odeint(Spiral(), numbers(1.2, 0.5), t, method=method, options=own), 1e-11, 1e-11)


def test_ode_demo_trains_alike() -> None:
    t = torch.linspace(0.0, 2.5, 20, dtype=torch.float64)
    matrix = numbers(-0.1, 2.0, -2.0, -0.1).view(2, 2)

    def train(d: Solver) -> list[torch.Tensor]:
        class Truth(nn.Module):
            def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return y**3 @ matrix

        with torch.no_grad():
            truth = d.odeint(Truth(), numbers(2.0, 0.0)[None], t, method="dopri5")
        net = Spiral()
        optimiser = torch.optim.RMSprop(net.parameters(), 1e-3)
        losses = []
        for i in range(5):
            optimiser.zero_grad()
            batch = torch.stack([truth[i : i + 10], truth[i + 3 : i + 13]], 1)
            guess = d.odeint(net, batch[0], t[:10])
            loss = (guess - batch).abs().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        return losses

    same(train, 1e-4, 1e-6)


@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint"])
def test_latent_ode_gradients(front: str) -> None:
    t = torch.linspace(0, 1, 6)

    def step(d: Solver) -> list[torch.Tensor]:
        torch.manual_seed(1)
        encoder, decoder, field = nn.GRU(2, 4), nn.Linear(4, 2), Spiral(torch.float32)
        field.net = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4))
        data = torch.randn(6, 3, 2)
        mean = encoder(data.flip(0))[1][0]
        z0 = mean + 0.1 * torch.randn(mean.shape)
        z = getattr(d, front)(field, z0, t).permute(1, 0, 2)
        (decoder(z) - data.transpose(0, 1)).square().mean().backward()
        return [p.grad for module in (encoder, decoder, field) for p in module.parameters()]

    same(step, 1e-3, 1e-5)


@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint"])
def test_gradients_to_the_times(front: str) -> None:
    def times(d: Solver) -> torch.Tensor:
        t = numbers(0.0, 0.6, 1.3, grad=True)
        getattr(d, front)(Spiral(), numbers(1.2, 0.5), t)[1:].square().sum().backward()
        return t.grad

    same(times)


@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint"])
def test_backwards_in_time(front: str) -> None:
    t = torch.linspace(1, -0.5, 5, dtype=torch.float64)

    def run(d: Solver) -> list[torch.Tensor]:
        y0 = numbers(1.2, 0.5, grad=True)
        ys = getattr(d, front)(Spiral(), y0, t)
        return [ys, *torch.autograd.grad(ys.square().sum(), y0)]

    same(run)


class Swing(nn.Module):
    """A pendulum whose state is a pair, one part [2, 1] and one part [3]."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(numbers(1.4))

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, v = state
        return self.rate * v.sum() * torch.ones_like(x), -torch.sin(x.mean()) * torch.ones_like(v)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "explicit_adams"])
@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint"])
def test_tuple_states(front: str, method: str) -> None:
    t = torch.linspace(0, 1, 30, dtype=torch.float64)

    def run(d: Solver) -> list[torch.Tensor]:
        field, state = Swing(), (numbers(0.3, 0.4)[:, None], numbers(0.1, 0.2, 0.3))
        options = {"max_order": 4} if "adams" in method else None
        x, v = getattr(d, front)(field, state, t, method=method, options=options)
        (x.square().sum() + v[-1].sum()).backward()
        return [x, v, field.rate.grad]

    same(run, 1e-4, 1e-5)


def test_complex_states() -> None:
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    z = torch.tensor([1.0 + 0.5j, -0.3j], dtype=torch.complex128)
    same(lambda d: d.odeint(lambda t, z: (1j - 0.2) * z * t, z, t))
    same(lambda d: d.odeint(lambda t, z: (1j - 0.2) * z * t, z, t, method="rk4"))


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.05}, {"safety": 0.7}, {"ifactor": 5.0, "dfactor": 0.5}, {"max_num_steps": 500},
        {"min_step": 1e-4}, {"max_step": 0.1}, {"dtype": torch.float64}, {"norm": lambda x: x.abs().max()},
        {"step_t": numbers(0.31, 0.77)}, {"jump_t": numbers(0.5)},
    ],
    ids=lambda o: "-".join(o),
)  # fmt: skip
def test_options_of_adaptive_methods(options: dict[str, Any]) -> None:
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    jump = lambda t, y: -y if t < 0.5 else 2 * y  # noqa: E731
    field = jump if "jump_t" in options else Spiral()
    same(lambda d: d.odeint(field, numbers(1.2, 0.5), t, method="dopri5", options=dict(options)))


@pytest.mark.parametrize("interp", ["linear", "cubic"])
def test_grid_constructor_and_interpolation(interp: str) -> None:
    t = torch.tensor([0.0, 0.33, 0.5, 1.0], dtype=torch.float64)
    options = {"grid_constructor": lambda f, y, t: torch.linspace(0, 1, 14, dtype=torch.float64), "interp": interp}
    same(
        lambda d: d.odeint(Spiral(), numbers(1.2, 0.5), t, method="rk4", options=dict(options)), 1e-12, 1e-12
    )  # fmt: skip


def test_callbacks() -> None:
    def count(d: Solver) -> list[int]:
        field = Spiral()
        seen = [0, 0, 0]

        def counting(which: int) -> Callable[..., None]:
            def call(t: torch.Tensor, y: torch.Tensor, dt: torch.Tensor) -> None:
                seen[which] += 1

            return call

        for which, name in enumerate(("callback_step", "callback_accept_step", "callback_reject_step")):
            setattr(field, name, counting(which))
        d.odeint(field, numbers(2.0, 0.0), torch.linspace(0, 5, 3, dtype=torch.float64))
        assert seen[0] == seen[1] + seen[2] > 0
        return seen

    assert count(torchdiffeq) == count(neuralode)


class Ball(nn.Module):
    """A bouncing ball: falls, and leaves the ground with most of its speed."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity, self.bounce = nn.Parameter(numbers(9.8)[0]), nn.Parameter(numbers(0.8)[0])

    def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return state[1], -self.gravity * torch.ones_like(state[1])

    def ground(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return state[0][0]


@pytest.mark.parametrize("front", ["odeint", "odeint_adjoint"])
def test_bouncing_ball(front: str) -> None:
    def times(d: Solver) -> list[torch.Tensor]:
        ball, t = Ball(), numbers(0.0)[0]
        state: tuple[torch.Tensor, ...] = (numbers(10.0, grad=True), numbers(0.0))
        y0, found = state[0], []
        for _ in range(3):
            t, path = d.odeint_event(
                ball, state, t, event_fn=ball.ground, reverse_time=False, atol=1e-8, rtol=1e-8,
                odeint_interface=getattr(d, front),
            )  # fmt: skip
            state = (path[0][-1] + 1e-5, -ball.bounce * path[1][-1])
            found.append(t)
        gradients = torch.autograd.grad(found[-1], [y0, ball.gravity, ball.bounce])
        return [*found, *gradients]

    same(times, 1e-6, 1e-8)
    first = times(neuralode)[0]
    assert float(first.detach()) == pytest.approx((2 * 10 / 9.8) ** 0.5, rel=1e-6)


def test_dense_output() -> None:
    y0 = numbers(1.2, 0.5)
    if not hasattr(torchdiffeq, "odeint_dense"):
        pytest.skip("this release of torchdiffeq has no odeint_dense")
    times = torch.linspace(0, 1, 9, dtype=torch.float64)

    def read(d: Solver) -> torch.Tensor:
        at = d.odeint_dense(Spiral(), y0, numbers(0.0)[0], numbers(1.0)[0])
        return torch.stack([at(time) for time in times])

    same(read)


@pytest.mark.parametrize(
    "keywords",
    [
        {}, {"adjoint_rtol": 1e-5, "adjoint_atol": 1e-6}, {"adjoint_method": "bosh3"},
        {"adjoint_options": {"norm": "seminorm"}}, {"adjoint_options": {"norm": lambda x: x[1].abs().max()}},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.02}},
        {"method": "rk4", "options": {"step_size": 0.05}},
        {"method": "dopri5", "options": {"norm": lambda x: x.abs().max()}},
    ],
    ids=str,
)  # fmt: skip
def test_keywords_of_the_adjoint(keywords: dict[str, Any]) -> None:
    def gradients(d: Solver) -> list[torch.Tensor]:
        field, y0 = Spiral(), numbers(1.2, 0.5, grad=True)
        d.odeint_adjoint(field, y0, numbers(0.0, 0.5, 1.0), **keywords).square().sum().backward()
        return [y0.grad, *(p.grad for p in field.parameters())]

    same(gradients, 1e-4, 1e-5)


def test_adjoint_params() -> None:
    def gradients(d: Solver) -> list[Any]:
        field, gain = Spiral(), numbers(0.7, grad=True)
        d.odeint_adjoint(
            lambda t, y: gain * field(t, y), numbers(1.2, 0.5), numbers(0.0, 1.0), adjoint_params=(gain,)
        ).sum().backward()  # fmt: skip
        assert all(p.grad is None for p in field.parameters())
        return [gain.grad]

    same(gradients, 1e-5, 1e-6)


def test_no_adjoint_params_at_all() -> None:
    def gradient(d: Solver) -> torch.Tensor:
        y0, field = numbers(1.2, 0.5, grad=True), Spiral()
        d.odeint_adjoint(field, y0, numbers(0.0, 1.0), adjoint_params=()).sum().backward()
        assert all(p.grad is None for p in field.parameters())
        return y0.grad

    same(gradient)


def f32(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


ONE, T01 = torch.ones(2), torch.tensor([0.0, 1.0])
WRONG: dict[str, Callable[[Solver], Any]] = {
    "times that turn": lambda d: d.odeint(f32, ONE, torch.tensor([0.0, 2.0, 1.0])),
    "times that repeat": lambda d: d.odeint(f32, ONE, torch.tensor([0.0, 1.0, 1.0])),
    "times on a list": lambda d: d.odeint(f32, ONE, [0.0, 1.0]),
    "times in two dimensions": lambda d: d.odeint(f32, ONE, T01[None]),
    "whole times": lambda d: d.odeint(f32, ONE, torch.tensor([0, 1])),
    "whole state": lambda d: d.odeint(f32, torch.ones(2, dtype=torch.int64), T01),
    "state that is no tensor": lambda d: d.odeint(f32, 1.0, T01),
    "tuple with a number in it": lambda d: d.odeint(lambda t, y: y, (ONE, 1.0), T01),
    "unknown method": lambda d: d.odeint(f32, ONE, T01, method="dopri55"),
    "options without a method": lambda d: d.odeint(f32, ONE, T01, options={"first_step": 0.1}),
    "both step_size and grid": lambda d: d.odeint(
        f32, ONE, T01, method="rk4", options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t}
    ),
    "grid that ends early": lambda d: d.odeint(
        f32, ONE, T01, method="rk4", options={"grid_constructor": lambda f, y, t: torch.linspace(0, 0.9, 5)}
    ),
    "interpolation that does not exist": lambda d: d.odeint(
        f32, ONE, torch.linspace(0, 1, 3), method="rk4", options={"interp": "quintic", "step_size": 0.3}
    ),
    "adjoint of no module": lambda d: d.odeint_adjoint(f32, ONE, T01),
    "too many steps": lambda d: d.odeint(f32, ONE, T01, method="dopri5", options={"max_num_steps": 1}),
    "nothing but NaN": lambda d: d.odeint(f32, ONE * torch.nan, T01),
    "blow-up": lambda d: d.odeint(lambda t, y: y**2, ONE, torch.tensor([0.0, 2.0])),
    "no gradient through event without one": lambda d: d.odeint_event(f32, ONE, T01[0], event_fn=None),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_it_refuses_is_refused_with_the_same_exception(wrong: Callable[[Solver], Any]) -> None:
    raised: list[type[BaseException] | None] = []
    for package in BOTH:
        try:
            wrong(package)
        except Exception as error:
            raised.append(type(error))
        else:
            raised.append(None)
    theirs, ours = raised
    if theirs is None:
        assert ours is None
    else:
        assert ours is not None
        assert issubclass(ours, theirs), "a program that catches the one catches the other"


@pytest.mark.parametrize("package", BOTH)
def test_a_field_of_another_shape_is_refused(package: Any) -> None:
    with pytest.raises(RuntimeError):
        package.odeint(lambda t, y: y[:1].expand(3), ONE, T01)


FUNCTIONS = [name for name in vars(torchdiffeq) if name.startswith("odeint")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_takes_the_same_arguments(name: str) -> None:
    theirs, ours = (inspect.signature(getattr(package, name)).parameters for package in BOTH)
    taken = {p.kind for p in ours.values()}
    missing = [p for p in theirs if p not in ours]
    assert not missing or inspect.Parameter.VAR_KEYWORD in taken, missing
    for parameter in theirs.values():
        if parameter.name in ours and parameter.default is not inspect.Parameter.empty:
            assert ours[parameter.name].default == parameter.default, parameter.name
