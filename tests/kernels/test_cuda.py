"""The kernels for CUDA, run by g++ through the shim, against plain PyTorch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

import neuralode
from neuralode.kernels.cuda.shim import Shim
from neuralode.kernels.cuda.solve import CUDASolve
from neuralode.kernels.program import STATE, UNARY
from neuralode.kernels.task import MISMATCH, Job, Task
from neuralode.nn import MLPField
from neuralode.ode import fused_engine, tableaus
from neuralode.ode.fused_engine import method_data
from neuralode.ode.tableaus import Tableau
from tests.kernels.comparison import TABLEAUS, compare, limits
from tests.kernels.programs import POSITIVE, UNARY_CONSTANTS, Builder, Case, gated, lorenz, mlp, random_program
from tests.kernels.programs import van_der_pol as stiff

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
SHIM = Shim()


@pytest.mark.parametrize("tableau", TABLEAUS, ids=lambda tableau: tableau.name)
def test_every_tableau(tableau: Tableau) -> None:
    compare(mlp(2, [8, 8], 5), 5, tableau, steps=None if tableau.adaptive else 6, machine=SHIM)


@pytest.mark.parametrize("widths", [(2, [64, 64]), (20, [100]), (3, [1, 5, 65, 2]), (130, [30])], ids=str)
def test_every_width(widths: tuple[int, list[int]]) -> None:
    compare(mlp(*widths, 34, time=True), 34, ts=torch.linspace(0, 1, 4).double(), machine=SHIM)


def test_what_does_not_fit_into_shared_memory() -> None:
    compare(mlp(8, [40, 40], 34), 34, machine=Shim(shared=30_000))


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "silu", "softplus", "elu", "leaky_relu", "gelu"])
def test_every_activation_of_a_network(activation: str) -> None:
    compare(mlp(2, [16, 9], 33, activation), 33, machine=SHIM)


@pytest.mark.parametrize("wide", [False, True], ids=["a thread a row", "a block a tile"])
def test_every_function(wide: bool) -> None:
    kinds = sorted(UNARY)
    b = Builder(3, 40)
    x = b("scale", STATE, width=3, constants=(0.5,))
    positive = b("shift", b("mul", x, x, width=3), width=3, constants=(0.5,))
    total = STATE
    for kind in kinds:
        for given in (kind,) * (2 if wide else 1):
            y = b(given, positive if kind in POSITIVE else x, width=3, constants=UNARY_CONSTANTS.get(kind, ()))
            total = b("sub", b("scale", y, width=3, constants=(0.1,)), total, width=3)
    compare(b.done(total), 40, machine=SHIM)


@pytest.mark.parametrize("case", [lorenz, stiff, lambda n: gated(6, n)], ids=["lorenz", "van der Pol", "gated"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per sample"])
@pytest.mark.parametrize("budget", [2**31, 0], ids=["kept", "again"])
def test_fields_without_a_name(case: Any, per_sample: bool, budget: int) -> None:
    ts = torch.linspace(0, 2, 5).double()
    compare(case(150), 150, ts=ts, per_sample=per_sample, budget=budget, machine=SHIM)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int) -> None:
    compare(random_program(seed, 35), 35, ts=torch.linspace(0, 1, 3).double(), rtol=1e-3, machine=SHIM)


@pytest.mark.parametrize("tableau", [tableaus.DOPRI5, tableaus.BOSH3, tableaus.FEHLBERG2], ids=lambda t: t.name)
@pytest.mark.parametrize("case", [stiff, lambda n: mlp(2, [20, 20], n)], ids=["van der Pol", "mlp"])
def test_steps_and_times_of_each_sample(tableau: Tableau, case: Any) -> None:
    ts = torch.stack([torch.linspace(0, 1 + i / 40, 4) for i in range(40)]).double()
    compare(case(40), 40, tableau, ts, per_sample=True, rtol=1e-3, machine=SHIM)


@pytest.mark.parametrize("times", ["whole", "inner", "of each sample", "backwards"])
@pytest.mark.parametrize("budget", [2**31, 0], ids=["kept", "again"])
@pytest.mark.parametrize("case", [lambda n: mlp(2, [9], n, time=True), lambda n: mlp(3, [70], n, time=True), stiff],
                         ids=["a thread a row", "a block a tile", "van der Pol"])  # fmt: skip
def test_gradients_of_times(case: Any, budget: int, times: str) -> None:
    ts = torch.tensor({"whole": [0.5, 1.5], "backwards": [1.0, 0.3, -0.2]}.get(times, [0.0, 0.4, 0.45, 1.0])).double()
    each = times == "of each sample"
    if each:
        ts = torch.stack([ts * (1 + i / 40) for i in range(33)])
    for tableau in (tableaus.DOPRI5, tableaus.BOSH3) if each else (tableaus.DOPRI5, tableaus.FEHLBERG2):
        compare(case(33), 33, tableau, ts, per_sample=each, budget=budget, gradient_of_ts=True, machine=SHIM)


@pytest.mark.parametrize("tableau", [tableaus.EULER, tableaus.RK4, tableaus.HEUN2], ids=lambda t: t.name)
@pytest.mark.parametrize("steps", [4, 7])
def test_gradients_of_times_through_given_steps(tableau: Tableau, steps: int) -> None:
    ts = torch.tensor([0.0, 0.25, 0.6, 1.0]).double()
    for case in (mlp(2, [9], 33, time=True), mlp(3, [70], 33, time=True)):
        compare(case, 33, tableau, ts, steps=steps, gradient_of_ts=True, machine=SHIM)


def test_more_steps_than_there_was_room_for() -> None:
    compare(lorenz(4), 4, ts=torch.tensor([0.0, 30.0]).double(), rtol=1e-8, machine=SHIM)


def test_backwards_in_time() -> None:
    compare(mlp(2, [8], 40), 40, ts=torch.tensor([1.0, 0.4, 0.1]).double(), machine=SHIM)


@pytest.mark.parametrize(
    "case", [mlp(3, [20, 20], 70), gated(6, 70), random_program(3, 70)], ids=["mlp", "gated", "any"]
)
def test_the_order_of_the_threads_does_not_matter(case: Case) -> None:
    """A thread that does not wait for another would show here."""
    results = []
    for shim in (Shim(), Shim(backwards=True)):
        solve = CUDASolve(shim, _task(case, 70))
        solve.forward()
        grad_y0, grads, _ = solve.backward(torch.ones_like(solve.ys), True)
        assert grad_y0 is not None
        results.append([solve.ys, grad_y0, *(g for g in grads if g is not None)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_program_that_is_not_the_field_is_noticed() -> None:
    case = mlp(2, [8], 40)
    right = case[0](torch.tensor(0.0).double(), _state(case, 40), case[1]).detach()
    for slope, status in ((right, 0), (right + 1e-3, MISMATCH)):
        assert CUDASolve(SHIM, _task(case, 40, slope)).forward().status == status


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_solve_of_the_package(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """From `solve` to the gradients of a module, with the shim in the place of the CPU's kernels."""
    torch.manual_seed(0)
    field = MLPField(2, [64, 64])
    y0, ts = torch.randn(40, 2), torch.linspace(0, 1, 4)
    options = {"step_size": 0.1} if method == "rk4" else {"rtol": 1e-5, "atol": 1e-6}
    found = []
    monkeypatch.setattr(fused_engine, "library", lambda: "the shim")
    monkeypatch.setattr(fused_engine, "_kernel_for", lambda task: CUDASolve(SHIM, task))
    monkeypatch.setattr(fused_engine, "_kinds", {})
    for engine in ("stepper", "fused"):
        solution = neuralode.solve(field, y0, ts, method=method, engine=engine, **options)
        gradients = torch.autograd.grad(solution.ys.square().sum(), list(field.parameters()))
        found.append([solution.ys.detach(), *gradients])
        assert solution.stats.engine == engine
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _state(case: Case, rows: int) -> torch.Tensor:
    return torch.randn(rows, case[0].width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _task(case: Case, rows: int, slope: torch.Tensor | None = None) -> Task:
    program, tensors = case
    job = Job(program, method_data(tableaus.DOPRI5), limits(1e-4, 1e-5), (0,) * program.width, records=True,
              wants_gradient=(True,) * len(tensors), budget=2**31)  # fmt: skip
    return Task(job, tensors, _state(case, rows), torch.tensor([0.0, 1.0]).double(), slope=slope)
