"""torchdiffeq's functions give torchdiffeq's numbers: to rounding on fixed steps, within its error on adaptive ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import nn

from neuralode import odeint, odeint_adjoint, odeint_dense, odeint_event
from neuralode.errors import UsageError
from neuralode.nn import MLPField
from neuralode.ode import solve
from neuralode.ode.methods import METHODS, SOLVERS, takes_fixed_steps
from tests.problems import PROBLEMS

T = torch.linspace(0, 1, 4)
Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0]])


def field() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [8], time=True)


def settings(method: str) -> dict[str, Any]:
    # explicit_adams blows up with its default, the twelfth order
    order = {"max_order": 5} if "adams" in method else {}
    return {"method": method, "options": {"step_size": 0.1, **order} if takes_fixed_steps(method) else None}


@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_odeint(method: str) -> None:
    for problem in PROBLEMS:
        for t in (problem.times(4), problem.times(4).flip(0)):
            start = problem.exact(t)[0]
            kwargs = {"rtol": 1e-4, "atol": 1e-4, **settings(method)}
            ours, theirs = (solver(problem.field, start, t, **kwargs) for solver in (odeint, torchdiffeq.odeint))
            if method not in METHODS:
                assert torch.equal(ours, theirs)
            elif takes_fixed_steps(method):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
            else:
                ours_off, theirs_off = ((ys - problem.exact(t)).abs().max() for ys in (ours, theirs))
                assert ours_off <= 1.5 * theirs_off + 1e-6, problem.name


@pytest.mark.parametrize("interp", [None, "linear", "cubic"])
def test_between_fixed_steps_the_interpolation_is_torchdiffeqs(interp: str | None) -> None:
    problem, t = PROBLEMS[0], torch.tensor([0.0, 0.33, 0.71, 3.0], dtype=torch.float64)
    options = {"step_size": 0.1} if interp is None else {"step_size": 0.1, "interp": interp}
    ours, theirs = (
        solver(problem.field, problem.y0, t, method="rk4", options=options) for solver in (odeint, torchdiffeq.odeint)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_without_a_step_size_the_times_are_the_grid() -> None:
    problem = PROBLEMS[0]
    ours, theirs = (
        solver(problem.field, problem.y0, problem.times(20), method="midpoint")
        for solver in (odeint, torchdiffeq.odeint)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_odeint_by_default() -> None:
    torch.testing.assert_close(odeint(field(), Y0, T), torchdiffeq.odeint(field(), Y0, T), rtol=1e-5, atol=1e-6)


class Recorder(MLPField):
    """Counts the steps that it is told of."""

    steps = 0

    def callback_accept_step(self, t: torch.Tensor, y: torch.Tensor, dt: torch.Tensor) -> None:
        self.steps += 1


@pytest.mark.parametrize(
    "options",
    [
        {"first_step": 0.01}, {"max_num_steps": 3}, {"norm": lambda x: x.abs().max()}, {"safety": 0.5, "ifactor": 2.0},
        {"step_t": torch.tensor([0.5])}, {"jump_t": torch.tensor([0.5])}, {"dtype": torch.float64}, {"min_step": 0.01},
    ],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_adaptive_options_are_taken(options: dict[str, Any]) -> None:
    found = []
    for solver in (odeint, torchdiffeq.odeint):
        found.append(solver(field(), Y0, T, rtol=1e-5, atol=1e-6, method="dopri5", options=dict(options)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"perturb": True},
        {"grid_constructor": lambda f, y, t: torch.linspace(0, 1, 31)},
        {"grid_constructor": lambda f, y, t: torch.tensor([0, 0.3, 0.9, 1, 1])},
    ],
)
def test_fixed_step_options_are_taken(options: dict[str, Any]) -> None:
    if "perturb" in options:
        options = {**options, "step_size": 0.1}
    found = [solver(field(), Y0, T, method="rk4", options=dict(options)) for solver in (odeint, torchdiffeq.odeint)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_step_limit_is_torchdiffeqs_and_counts_from_output_to_output() -> None:
    hard = {"rtol": 1e-9, "atol": 1e-9, "method": "bosh3"}
    for solver in (odeint, torchdiffeq.odeint):
        with pytest.raises(AssertionError):
            solver(field().double(), Y0.double(), T.double(), **hard, options={"max_num_steps": 3})
    needed = solve(field().double(), Y0.double(), T.double(), **hard).stats.accepted
    odeint(field().double(), Y0.double(), T.double(), **hard, options={"max_num_steps": int(needed / 2)})


def test_callbacks_are_called() -> None:
    torch.manual_seed(0)
    module = Recorder(2, [8])
    odeint(module, Y0, T)
    assert module.steps > 0


class Counting(nn.Module):
    """A callback that is a module itself."""

    calls = 0

    def forward(self, *_: Any) -> None:
        self.calls += 1


def test_callbacks_are_found_wherever_an_object_has_them() -> None:
    hung, held = Counting(), Counting()
    as_attribute, as_submodule = field(), field()
    as_attribute.callback_step, as_submodule.callback_step = hung.forward, held
    for module in (as_attribute, as_submodule):
        odeint(module, Y0, T)
    assert min(hung.calls, held.calls) > 0


@pytest.mark.parametrize("tolerances", [
    {"rtol": torch.tensor([1e-4, 1e-5]), "atol": 1e-6}, {"rtol": (1e-4, 1e-5), "atol": (1e-6, 1e-6)},
], ids=["tensor", "tuple"])  # fmt: skip
def test_tolerances_for_each_entry_are_taken(tolerances: dict[str, Any]) -> None:
    pair = isinstance(tolerances["rtol"], tuple)
    f = (lambda t, y: (y[1], -y[0])) if pair else (lambda t, y: -y)
    start = (Y0, Y0) if pair else Y0
    ours, theirs = (solver(f, start, T, **tolerances) for solver in (odeint, torchdiffeq.odeint))
    for a, b in zip(*(x if pair else (x,) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_single_time_and_runaway_solution_are_as_torchdiffeq_has_them() -> None:
    assert torch.equal(odeint(field(), Y0, T[:1]), torchdiffeq.odeint(field(), Y0, T[:1]))
    runaway = [solver(lambda t, y: y**3, 9 * Y0, T, method="euler") for solver in (odeint, torchdiffeq.odeint)]
    torch.testing.assert_close(runaway[0], runaway[1], equal_nan=True)


def test_dense_output_is_the_solution_between_the_times() -> None:
    problem = PROBLEMS[0]
    at = odeint_dense(problem.field, problem.y0, problem.times()[0], problem.times()[1], rtol=1e-9, atol=1e-9)
    times = problem.times(13)
    torch.testing.assert_close(at(times), problem.exact(times), rtol=0, atol=1e-6)
    torch.testing.assert_close(at(times[5]), problem.exact(times)[5], rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match=r"odeint_dense cannot serve.*scipy_solver"):
        odeint_dense(problem.field, problem.y0, 0.0, 1.0, method="scipy_solver")


def test_odeint_of_a_tuple() -> None:
    ours, theirs = (
        solver(lambda t, y: (y[1], -y[0]), (Y0, 2 * Y0), T, rtol=1e-4) for solver in (odeint, torchdiffeq.odeint)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "midpoint"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(odeint, torchdiffeq.odeint), (odeint_adjoint, torchdiffeq.odeint_adjoint)],
    ids=["exact", "adjoint"],
)
def test_gradients(ours: Any, theirs: Any, method: str) -> None:
    found = []
    for solver in (ours, theirs):
        module, y0, t = field().double(), Y0.double().requires_grad_(), T.double().requires_grad_()
        solver(module, y0, t, rtol=1e-9, atol=1e-9, **settings(method)).pow(2).sum().backward()
        found.append([y0.grad, t.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        # the adjoint's own steps are not those of the forward solve, whose times end on other multiples of the step
        torch.testing.assert_close(a, b, rtol=1e-4 if ours is odeint_adjoint else 1e-5, atol=1e-6)
        assert a.abs().max() > 0


@pytest.mark.parametrize(
    "keywords",
    [
        {"adjoint_rtol": 1e-6, "adjoint_atol": 1e-6, "adjoint_options": {"norm": "seminorm"}},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.05}},
        {"adjoint_options": {"norm": lambda state: state[2].abs().max()}},
    ],
    ids=["seminorm", "other method", "own norm"],
)
def test_adjoint_keywords_are_taken(keywords: dict[str, Any]) -> None:
    found = []
    for solver in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        module = field()
        solver(module, Y0, T, **keywords).sum().backward()
        found.append([p.grad for p in module.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_adjoint_parameters_given_by_hand() -> None:
    module = field()
    named = tuple(module.parameters())[:2]
    odeint_adjoint(lambda t, y: module(t, y), Y0, T, adjoint_params=named).sum().backward()
    assert all(p.grad is not None for p in named)
    assert all(p.grad is None for p in tuple(module.parameters())[2:])
    with pytest.raises(ValueError, match=r"nn\.Module"):
        odeint_adjoint(lambda t, y: module(t, y), Y0, T)


def fall(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Height and speed under a gravity of 2."""
    return torch.stack([y[1], torch.full_like(y[1], -2.0)])


def ground(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y[0]


def test_event_time_and_its_gradient() -> None:
    found = []
    for solver in (odeint_event, torchdiffeq.odeint_event):
        y0 = torch.tensor([4.0, 0.0], dtype=torch.float64, requires_grad=True)
        time, states = solver(fall, y0, torch.tensor(0.0, dtype=torch.float64), event_fn=ground, atol=1e-10)
        time.backward()
        found.append((time, states, y0.grad))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    time, states, gradient = found[0]
    # from height h the ground is reached at √h, with the derivative 1 / (2√h)
    torch.testing.assert_close(time, torch.full_like(time, 2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[0], torch.full_like(time, 0.25), rtol=1e-6, atol=0)
    assert states.shape == (2, 2)


def test_odeint_stops_at_an_event() -> None:
    y0, t = torch.tensor([4.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    ours, theirs = (solver(fall, y0, t, event_fn=ground) for solver in (odeint, torchdiffeq.odeint))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("solver", [odeint, odeint_adjoint])
def test_unknown_method_has_the_nearest_one(solver: Any) -> None:
    with pytest.raises(UsageError, match=r"'dopr5'; did you mean 'dopri5'\?"):
        solver(field(), Y0, T, method="dopr5")


def test_unknown_method_of_an_event_has_the_nearest_one() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        odeint_event(fall, torch.tensor([4.0, 0.0]), torch.tensor(0.0), event_fn=ground, method="dopr5")


@pytest.mark.parametrize("interface", [{}, {"odeint_interface": odeint}], ids=["alone", "with odeint"])
def test_a_method_of_ours_for_an_event_is_refused_in_the_same_words(interface: Any) -> None:
    with pytest.raises(UsageError, match="'tsit5' is not torchdiffeq's"):
        odeint_event(fall, Y0[0], torch.tensor(0.0), event_fn=ground, method="tsit5", **interface)


def test_assertions_stay_assertions() -> None:
    with pytest.raises(AssertionError, match="strictly increasing"):
        odeint(field(), Y0, torch.tensor([0.0, 2.0, 1.0]))


def test_first_gradients_of_the_adjoint_that_keep_their_graph() -> None:
    found = []
    for solver in (odeint_adjoint, torchdiffeq.odeint_adjoint):
        y0, t, module = Y0.clone().requires_grad_(), T.clone().requires_grad_(), field()
        ys = solver(module, y0, t, rtol=1e-5, atol=1e-5)
        found.append(torch.autograd.grad(ys.square().sum(), [y0, t, *module.parameters()], create_graph=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
