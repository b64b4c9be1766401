"""One solve by the kernels against plain PyTorch: the same program, solved by the stepper, and autograd."""

from __future__ import annotations

from typing import Any

import torch

import neuralode
from neuralode.kernels import library as builds
from neuralode.kernels.cpu import CPUSolve
from neuralode.kernels.cuda.solve import CUDASolve, Machine
from neuralode.kernels.library import Library
from neuralode.kernels.task import SUCCESS, Job, LimitsData, Task
from neuralode.ode import tableaus, tableaus_order8
from neuralode.ode.fused_engine import method_data
from neuralode.ode.tableaus import Tableau
from tests.kernels.programs import Case

TABLEAUS = [
    value
    for module in (tableaus, tableaus_order8)
    for value in vars(module).values()
    if isinstance(value, Tableau)
]  # fmt: skip
BUILDS = [name for name in builds.INSTRUCTION_SETS if builds.runs_here(name) and builds.path_of(name).exists()]


def loaded(name: str) -> Library:
    functions = builds.load(builds.path_of(name))
    assert functions is not None
    return Library(name, builds.path_of(name), functions)


def limits(rtol: float, atol: float, **changes: Any) -> LimitsData:
    standard = {
        "integral": 1.0, "proportional": 0.0, "derivative": 0.0, "safety": 0.9, "min_factor": 0.2, "max_factor": 10.0,
        "first_step": 0.0, "max_steps": 10_000, "max_steps_between": 2**62,
    }  # fmt: skip
    return LimitsData(rtol, atol, **{**standard, **changes})


def compare(
    case: Case, rows: int, tableau: Tableau = tableaus.DOPRI5, ts: torch.Tensor | None = None, steps: int | None = None,
    per_sample: bool = False, budget: int = 2**31, build: str = "", rtol: float = 1e-4, gradient_of_ts: bool = False,
    machine: Machine | None = None,
) -> None:  # fmt: skip
    """States, steps and all gradients of one solve equal the stepper's in double precision, to rounding."""
    program, tensors = case
    generator = torch.Generator().manual_seed(1)
    y0 = torch.randn(rows, program.width, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_()
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64) if ts is None else ts
    ts = ts.clone().requires_grad_(gradient_of_ts)
    end = float(ts.detach().reshape(-1)[-1])
    first = float(ts.detach().reshape(-1)[0])
    options: dict[str, Any] = {"step_size": abs(end - first) / steps} if steps else {}
    solution = neuralode.solve(
        lambda t, y: program(t, y, tensors), y0, ts, method=tableau.name, rtol=rtol, atol=rtol / 10, engine="stepper",
        per_sample=per_sample, **options,
    )  # fmt: skip
    weights = torch.randn(solution.ys.shape, generator=generator, dtype=torch.float64)
    inputs = [y0, *tensors, *([ts] if gradient_of_ts else [])]
    expected = torch.autograd.grad((solution.ys * weights).sum(), inputs, allow_unused=True)
    grid = (*(first + i * (end - first) / steps for i in range(steps)), end) if steps else None
    interpolates = tableau.interpolant_order >= tableau.order - 1
    job = Job(
        program, method_data(tableau, lands=not interpolates and not per_sample), limits(rtol, rtol / 10),
        (0,) * program.width, per_sample, True, (True,) * len(tensors), gradient_of_ts, budget,
    )  # fmt: skip
    task = Task(job, tensors, y0.detach(), ts.detach(), grid)
    solve = CUDASolve(machine, task) if machine else CPUSolve(loaded(build or BUILDS[0]), task)
    report = solve.forward()
    assert report.status == SUCCESS
    assert (report.accepted, report.rejected) == (solution.stats.accepted, solution.stats.rejected)
    # the stepper may take a slope at the very end that nobody reads
    assert solution.stats.nfe - 1 <= report.evaluations <= solution.stats.nfe
    assert_close(solve.ys, solution.ys)
    for _ in range(2):  # a second backward pass gives the same
        grad_y0, grad_tensors, grad_ts = solve.backward(weights, True)
        found = [grad_y0, *grad_tensors, *([grad_ts] if gradient_of_ts else [])]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is not None
            assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.linalg.vector_norm(ours - theirs) <= 1e-11 * (1 + torch.linalg.vector_norm(theirs))
