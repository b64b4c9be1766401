"""The kernels of the CPU against plain PyTorch: the same program, solved by the stepper, differentiated by autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from neuralode.kernels import library as builds
from neuralode.kernels.cpu import CPUSolve
from neuralode.kernels.program import UNARY
from neuralode.kernels.task import MISMATCH, SUCCESS, Job, Task
from neuralode.ode import tableaus
from neuralode.ode.fused_engine import method_data
from neuralode.ode.tableaus import Tableau
from tests.kernels.comparison import BUILDS, TABLEAUS, compare, limits, loaded
from tests.kernels.programs import gated, lorenz, mlp, random_program, unary, van_der_pol

pytestmark = pytest.mark.skipif(not BUILDS, reason=builds.why_not() if not BUILDS else "")


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda tableau: tableau.name)
@pytest.mark.parametrize("budget", [2**31, 0], ids=["kept", "again"])
def test_every_tableau(tableau: Tableau, budget: int) -> None:
    compare(mlp(2, [8, 8], 5), 5, tableau, steps=None if tableau.adaptive else 6, budget=budget)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("rows", [1, 31, 33, 100])
def test_every_build_and_number_of_rows(build: str, rows: int) -> None:
    compare(mlp(11, [20, 17], rows, time=True), rows, build=build, ts=torch.linspace(0, 1, 4).double())


@pytest.mark.parametrize("kind", sorted(UNARY))
@pytest.mark.parametrize("build", BUILDS)
def test_every_function(kind: str, build: str) -> None:
    compare(unary(kind, 9), 9, build=build)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "silu", "softplus", "elu", "leaky_relu", "gelu"])
def test_every_activation_of_a_network(activation: str) -> None:
    compare(mlp(2, [16, 9], 40, activation), 40)


@pytest.mark.parametrize(
    "widths", [(2, [50]), (20, [100, 100]), (64, [256, 256]), (3, [1, 5, 65, 2]), (128, [30])], ids=str
)
def test_every_width(widths: tuple[int, list[int]]) -> None:
    compare(mlp(*widths, 34), 34)


@pytest.mark.parametrize(
    "case", [lorenz, van_der_pol, lambda rows: gated(6, rows)], ids=["lorenz", "van der Pol", "gated"]
)
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("budget", [2**31, 0], ids=["kept", "again"])
def test_fields_without_a_name(case: Any, per_sample: bool, budget: int) -> None:
    compare(case(50), 50, ts=torch.linspace(0, 2, 5).double(), per_sample=per_sample, budget=budget)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    compare(random_program(seed, 35), 35, ts=torch.linspace(0, 1, 3).double(), rtol=1e-3)


@pytest.mark.parametrize("tableau", [tableaus.DOPRI5, tableaus.BOSH3, tableaus.ADAPTIVE_HEUN, tableaus.FEHLBERG2],
                         ids=lambda tableau: tableau.name)  # fmt: skip
@pytest.mark.parametrize("budget", [2**31, 0, 60_000], ids=["kept", "again", "both"])
def test_steps_of_each_sample(tableau: Tableau, budget: int) -> None:
    ts = torch.stack([torch.linspace(0, 1 + i / 40, 4) for i in range(40)]).double()
    compare(van_der_pol(40), 40, tableau, ts, per_sample=True, budget=budget, rtol=1e-3)


@pytest.mark.parametrize("tableau", [tableaus.DOPRI5, tableaus.TSIT5, tableaus.BOSH3, tableaus.ADAPTIVE_HEUN],
                         ids=lambda tableau: tableau.name)  # fmt: skip
@pytest.mark.parametrize("backwards", [False, True])
def test_gradients_of_the_times(tableau: Tableau, backwards: bool) -> None:
    ts = torch.tensor([0.1, 0.35, 0.7, 1.3], dtype=torch.float64)
    case = mlp(2, [9], 33, time=True)
    for budget, per_sample in itertools.product((2**31, 0), (False, True)):
        compare(case, 33, tableau, ts.flip(0) if backwards else ts, per_sample=per_sample, budget=budget,
                gradient_of_ts=True)  # fmt: skip


@pytest.mark.parametrize("tableau", [tableaus.EULER, tableaus.RK4], ids=lambda tableau: tableau.name)
def test_gradients_of_the_times_through_fixed_steps(tableau: Tableau) -> None:
    for inner, budget in itertools.product((0.33, 0.5), (2**31, 0)):  # within a step, and at the end of one
        ts = torch.tensor([0.0, inner, 1.0], dtype=torch.float64)
        compare(mlp(2, [9], 33, time=True), 33, tableau, ts, steps=4, budget=budget, gradient_of_ts=True)


@pytest.mark.parametrize("tableau", [tableaus.EULER, tableaus.RK4, tableaus.MIDPOINT], ids=lambda tableau: tableau.name)
@pytest.mark.parametrize("budget", [2**31, 0, 200_000], ids=["kept", "again", "both"])
def test_fixed_steps_with_outputs_between_them(tableau: Tableau, budget: int) -> None:
    compare(mlp(2, [9], 70), 70, tableau, torch.tensor([0.0, 0.2, 0.21, 1.0]).double(), steps=7, budget=budget)


def test_a_budget_bounds_what_is_kept() -> None:
    program, tensors = mlp(2, [64, 64], 64)
    y0 = torch.randn(64, 2, dtype=torch.float64)
    kept = []
    for budget in (0, 300_000, 2**31):
        job = Job(program, method_data(tableaus.RK4), limits(1.0, 1.0), (0, 0), records=True,
                  wants_gradient=(True,) * 6, budget=budget)  # fmt: skip
        task = Task(job, tensors, y0, torch.tensor([0.0, 1.0]).double(), tuple(i / 20 for i in range(21)))
        kept.append(CPUSolve(loaded(BUILDS[0]), task).forward().kept_bytes)
    state = 20 * 64 * 2 * 8  # bytes of the states at the starts of the steps
    assert kept[0] < 3 * state
    assert kept[0] < kept[1] < 600_000 < kept[2]


def test_one_thread_and_two_agree() -> None:
    program, tensors = mlp(2, [16], 200)
    y0 = torch.randn(200, 2, dtype=torch.float64)
    job = Job(program, method_data(tableaus.DOPRI5), limits(1e-4, 1e-5), (0, 0))
    task = Task(job, tensors, y0, torch.tensor([0.0, 1.0]).double())
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            solve = CPUSolve(loaded(BUILDS[0]), task)
            solve.forward()
            found.append(solve.ys)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_program_that_is_not_the_field_is_noticed() -> None:
    program, tensors = mlp(2, [8], 40)
    y0 = torch.randn(40, 2, dtype=torch.float64)
    slope = program(torch.zeros(()), y0, tensors).detach()
    for error, status in ((0.0, SUCCESS), (1e-5, MISMATCH)):
        wrong = slope.clone()
        wrong[37, 1] += error
        job = Job(program, method_data(tableaus.DOPRI5), limits(1e-4, 1e-5), (0, 0))
        task = Task(job, tensors, y0, torch.tensor([0.0, 1.0]).double(), slope=wrong)
        assert CPUSolve(loaded(BUILDS[0]), task).forward().status == status


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", sorted(UNARY))
@pytest.mark.parametrize("build", BUILDS)
def test_functions_are_as_accurate_as_the_precision_allows(kind: str, build: str, dtype: torch.dtype) -> None:
    """One Euler step of size 1 from 0 by f(x), x being a tensor of the program: y1 is the value itself."""
    from neuralode.kernels.program import Operation, Program
    from tests.kernels.programs import POSITIVE, UNARY_CONSTANTS

    x = torch.cat([torch.linspace(-30, 30, 601), torch.logspace(-6, 1, 400), -torch.logspace(-6, 1, 400)]).double()
    if kind in POSITIVE:
        x = x.abs() + 1e-6
    x = x.to(dtype).reshape(-1, 1)
    constants = UNARY_CONSTANTS.get(kind, ())
    program = Program(1, (Operation("rows", (), 1, (0,)), Operation(kind, (2,), 1, (), constants)), 3, ((-1, 1),))
    job = Job(program, method_data(tableaus.EULER), limits(1.0, 1.0), (0,))
    task = Task(job, [x], torch.zeros_like(x), torch.tensor([0.0, 1.0]).double(), (0.0, 1.0))
    solve = CPUSolve(loaded(build), task)
    solve.forward()
    exact = UNARY[kind](x.double(), *constants)
    theirs = UNARY[kind](x, *constants).double()
    # of PyTorch's own error, and of the rounding of a result
    bound = 4 * (theirs - exact).abs() + 6 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert bool(((solve.ys[1].double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", BUILDS)
def test_tanh_is_one_where_the_librarys_is(build: str, dtype: torch.dtype) -> None:
    """Else 1 - tanh² is not zero, which a factor that grows, as in the gelu by tanh, makes large."""
    from neuralode.kernels.program import Operation, Program

    x = torch.tensor([-torch.inf, -1e30, -300, -20, 20, 31, 300, 1e30, torch.inf, torch.nan], dtype=dtype).view(-1, 1)
    program = Program(1, (Operation("rows", (), 1, (0,)), Operation("tanh", (2,), 1)), 3, ((-1, 1),))
    job = Job(program, method_data(tableaus.EULER), limits(1.0, 1.0), (0,))
    solve = CPUSolve(loaded(build), Task(job, [x], torch.zeros_like(x), torch.tensor([0.0, 1.0]).double(), (0.0, 1.0)))
    solve.forward()
    torch.testing.assert_close(solve.ys[1], x.tanh(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", [{"per_sample": True}, {"steps": 7, "tableau": tableaus.RK4}, {}], ids=str)
def test_a_solve_that_is_looked_after_after_every_step(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its steps a solve lets Python see to its signals; it goes on from where it was."""
    monkeypatch.setattr("neuralode.kernels.cpu._PATIENCE", 0.0)
    compare(van_der_pol(70), 70, ts=torch.linspace(0, 2, 4).double(), **way)
