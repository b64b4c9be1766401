"""Combinations of slopes in one pass, by the kernels, against the same operation by operation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from neuralode import solve
from neuralode.kernels.library import library, why_not
from neuralode.ode import combine
from neuralode.ode.controllers import Controller
from neuralode.ode.tolerance import Tolerance

pytestmark = pytest.mark.skipif(library() is None, reason=why_not())
ROW = [(0, 0.3), (2, -1.7), (3, 0.25), (4, 2.0)]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combine, "_LARGE", 0)


def state(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype), [torch.randn(shape, dtype=dtype) for _ in range(5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1024,), (1025,), (7, 4, 9001)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("used", [2, 3, 4])
@pytest.mark.usefixtures("always")
def test_a_combination(dtype: torch.dtype, shape: tuple[int, ...], threads: int, used: int) -> None:
    torch.set_num_threads(threads)
    y, slopes = state(*shape, dtype=dtype)
    wanted = y.double() + 0.1 * sum(w * slopes[i].double() for i, w in ROW[:used])
    for made in (combine.stage, combine.end):
        found = made(y, slopes, ROW[:used], 0.1)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3, 5), (1024,), (7, 4, 9001)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_over_the_tolerance(dtype: torch.dtype, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    y, slopes = state(*shape, dtype=dtype)
    y1, tolerance = slopes[1] * 3, Tolerance(1e-2, 1e-3)
    error = 0.1 * sum(w * slopes[i].double() for i, w in ROW)
    wanted = Tolerance(1e-2, 1e-3).ratio(error, y.double(), y1.double())
    assert combine.error_ratio(slopes, ROW, 0.1, y, y1, tolerance) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("where", ["y", "y1", "slope"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_never_accepted_where_it_was_not(
    where: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, slopes = state(40)
    y1 = y + 0.1
    {"y": y, "y1": y1, "slope": slopes[2]}[where][17] = value
    ours = combine.error_ratio(slopes, ROW, 0.1, y, y1, Tolerance(1e-2, 1e-3))
    monkeypatch.setattr("neuralode.kernels.stages.library", lambda: None)
    theirs = combine.error_ratio(slopes, ROW, 0.1, y, y1, Tolerance(1e-2, 1e-3))
    assert ours == pytest.approx(theirs, nan_ok=True)


@pytest.mark.usefixtures("always")
def test_gradients_of_both_orders() -> None:
    y, slopes = state(2, 3)
    leaves = [y.requires_grad_(), *(x.requires_grad_() for x in slopes)]

    def cubed(y: torch.Tensor, *slopes: torch.Tensor) -> torch.Tensor:
        return combine.stage(y, slopes, ROW, 0.1) ** 3

    assert torch.autograd.gradcheck(cubed, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(cubed, leaves)


@pytest.mark.usefixtures("always")
def test_only_what_wants_a_gradient_gets_one() -> None:
    y, slopes = state(6)
    slopes[2].requires_grad_()
    combine.stage(y, slopes, ROW, 0.1).sum().backward()
    assert y.grad is None
    torch.testing.assert_close(slopes[2].grad, torch.full((6,), -0.17, dtype=torch.float64))


@pytest.mark.usefixtures("always")
def test_what_the_kernels_cannot_take_is_combined_all_the_same() -> None:
    y, slopes = state(4, 6)
    wanted = combine.stage(y, slopes, ROW, 0.1)
    strange = [x.t().contiguous().t() for x in slopes]
    torch.testing.assert_close(combine.stage(y, strange, ROW, 0.1), wanted)
    torch.testing.assert_close(combine.stage(y + 0j, [x + 0j for x in slopes], ROW, 0.1), wanted + 0j)
    mapped = torch.func.vmap(lambda y, *slopes: combine.stage(y, slopes, ROW, 0.1))(y, *slopes)
    torch.testing.assert_close(mapped, wanted)
    _, tangent = torch.func.jvp(lambda y: combine.stage(y, slopes, ROW, 0.1), (y,), (torch.ones_like(y),))
    torch.testing.assert_close(tangent, torch.ones_like(y))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("checkpoint", ["never", "always", 2])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dop853", "rk4"])
def test_a_solve_with_and_without(method: str, checkpoint: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 3, padding=1)).double()
    y0, found = torch.randn(3, 2, 8, dtype=torch.float64), []
    how = {"step_size": 0.1} if method == "rk4" else {"rtol": 1e-6, "atol": 1e-8}
    for _ in range(2):
        ys = solve(lambda t, y: net(y), y0, [0.0, 0.3, 1.0], method=method, engine="stepper", checkpoint=checkpoint,
                   **how).ys  # fmt: skip
        gradients = torch.autograd.grad(ys.square().sum(), list(net.parameters()))
        found.append([ys.detach(), *gradients])
        monkeypatch.setattr("neuralode.kernels.stages.library", lambda: None)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def spreading(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Samples that need steps of very different sizes."""
    return torch.linspace(0.1, 30, len(y), dtype=y.dtype)[:, None] * torch.stack([y[:, 1], -y[:, 0] * y[:, 1].cos()], 1)


def tried(h: torch.Tensor) -> combine.kernels.RowSteps:
    """Steps of rows that are far from their end."""
    ones, none = torch.ones_like(h), torch.zeros_like(h, dtype=torch.bool)
    times = ones[:, None] * torch.tensor([0.0, 0.05, 0.1, 0.2, 1e9], dtype=h.dtype)
    return combine.kernels.RowSteps(
        h, 0 * ones, 1e9 * ones, ones, 10 * ones, ones, ones, none, none, none.long() + 1, times
    )


def judge(
    slopes: list[torch.Tensor], row: combine.Row, y: torch.Tensor, y1: torch.Tensor, tolerance: Tolerance,
    control: Controller, order: int, steps: combine.kernels.RowSteps,
) -> combine.kernels.Judged | None:  # fmt: skip
    who = combine.judge_of(tolerance, control, order, steps)
    return who and combine.judge_rows(who, slopes, row, y, y1)


@pytest.mark.parametrize("controller", ["I", "PI", "PID"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dop853"])
def test_rows_are_judged_as_by_operations(method: str, controller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y0, _ = state(17, 2)
    y0.requires_grad_()
    found = []
    for by_operations in (False, True):
        if by_operations:
            monkeypatch.setattr(combine, "judge_rows", lambda *_: None)
        solution = solve(spreading, y0, [0.0, 0.2, 0.6], method=method, controller=controller, rtol=1e-5, atol=1e-7,
                         per_sample=True, engine="stepper")  # fmt: skip
        (gradient,) = torch.autograd.grad(solution.ys.square().sum(), y0)
        found.append((solution.ys, gradient, solution.stats.accepted_per_sample, solution.stats.rejected_per_sample))
        assert solution.stats.rejected_per_sample is not None
        assert int(solution.stats.rejected_per_sample.max()) > 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 1500])
def test_a_row_that_is_not_finite_is_broken_and_the_others_are_not(width: int, dtype: torch.dtype) -> None:
    y, slopes = state(4, width, dtype=dtype)
    slopes[2][1, 0], slopes[3][2, -1] = math.nan, math.inf
    steps = tried(torch.full((4,), 1e-9, dtype=torch.float64))
    judged = judge(slopes, ROW, y, y, Tolerance(1e-3, 1e-3), Controller(), 5, steps)
    assert judged is not None
    assert judged.breaks == 2
    assert judged.broken.tolist() == [False, True, True, False]
    assert judged.accepted.tolist() == [True, False, False, True]
    torch.testing.assert_close(judged.size, 1e-9 * torch.tensor([9.0, 0.2, 0.2, 9.0]).double(), rtol=0.5, atol=0)


def test_the_kernels_leave_rows_alone_that_they_do_not_know() -> None:
    y, slopes = state(4, 2)
    ones = torch.ones(4, dtype=torch.float64)
    for given, tolerance in (((y, y.mT.contiguous().mT), Tolerance(1e-3, 1e-3)), ((y, y), Tolerance(ones, 1e-3))):
        assert judge(slopes, ROW, *given, tolerance, Controller(), 5, tried(ones)) is None


def test_what_a_solve_keeps_of_its_steps_lies_in_no_memory_besides() -> None:
    y, slopes = state(100, 2)
    steps = tried(torch.full((100,), 0.1, dtype=torch.float64))
    judged = judge(slopes, ROW, y, y, Tolerance(1e-3, 1e-3), Controller(), 5, steps)
    assert judged is not None
    kept = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in (judged.moved, judged.after.t, judged.landed)
    }
    assert sum(kept.values()) == 100 * (8 + 8 + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 1030, 2500])
def test_a_row_is_judged_alike_wherever_it_lies(width: int, dtype: torch.dtype) -> None:
    y, slopes = state(700 if width < 10 else 7, width, dtype=dtype)
    sizes = []
    for first in (0, 2):
        rows = [x[first:].contiguous() for x in (y, *slopes)]
        steps = tried(torch.full((len(rows[0]),), 0.1, dtype=torch.float64))
        judged = judge(rows[1:], ROW, rows[0], rows[0], Tolerance(1e-3, 1e-3), Controller(), 5, steps)
        assert judged is not None
        sizes.append(judged.size)
    assert torch.equal(sizes[0][2:], sizes[1])


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_are_judged_by_all_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    y, slopes = state(40_000, 2)
    steps = torch.rand(40_000, dtype=torch.float64)
    judged = judge(slopes, ROW, y, slopes[1], Tolerance(0.5, 0.5), Controller(), 5, tried(steps))
    assert judged is not None
    error = steps[:, None] * sum(w * slopes[i] for i, w in ROW) / (0.5 + 0.5 * torch.maximum(y.abs(), slopes[1].abs()))
    ratio = error.square().mean(1).sqrt()
    assert torch.equal(judged.accepted, ratio <= 1)
    assert 1000 < int(judged.accepted.sum()) < 39_000
    factor = (0.9 * ratio**-0.2).clamp(0.2, 10.0)
    wanted = torch.where(judged.accepted, factor.clamp(min=1), factor.clamp(max=1)) * steps
    torch.testing.assert_close(judged.size, wanted)
    assert torch.equal(judged.moved, torch.where(judged.accepted, steps, 0.0))


def test_rows_move_by_the_steps_that_stand_and_end_where_they_should() -> None:
    """The error is zero but in the last row: the others accept, and their next steps are ten times as long."""
    y = torch.zeros(5, 2, dtype=torch.float64)
    slopes = [y, torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=y.dtype)[:, None].expand(5, 2).contiguous()]
    h = torch.tensor([0.1, 0.1, 0.5, 0.0, 0.1], dtype=y.dtype)
    # far from its end; one that the next step would pass; one that this step reaches; one at its end; a rejected one
    steps = tried(h)._replace(
        t=torch.tensor([0.0, 0.0, 0.5, 1.0, 0.0], dtype=y.dtype), end=torch.tensor([9.0, 1.0, 1.0, 1.0, -1.0]).double(),
        lands=torch.tensor([False, False, True, True, False]), ended=torch.tensor([False, False, False, True, False]),
    )  # fmt: skip
    judged = judge(slopes, [(1, 1.0)], y, y, Tolerance(0.0, 1e-9), Controller(), 5, steps)
    assert judged is not None
    assert judged.accepted.tolist() == [True, True, True, False, False]
    assert judged.moved.tolist() == [0.1, 0.1, 0.5, 0.0, 0.0]
    assert judged.landed.tolist() == [False, False, True, False, False]
    assert judged.after.t.tolist() == [0.1, 0.1, 1.0, 1.0, 0.0]
    assert judged.after.ended.tolist() == [False, False, True, True, False]
    assert judged.after.lands.tolist() == [False, True, False, False, False]
    torch.testing.assert_close(judged.after.h, torch.tensor([1.0, 0.9, 0.0, 0.0, -0.02], dtype=y.dtype))
    assert judged.smallest == pytest.approx(0.02)
    assert judged.after.output.tolist() == [3, 3, 4, 4, 1]
    assert judged.most == 3
    done = judge(slopes, [(1, 1.0)], y, y, Tolerance(0.0, 1.0), Controller(), 5,
                              steps._replace(lands=torch.ones(5, dtype=torch.bool)))  # fmt: skip
    assert done is not None
    assert done.smallest == math.inf
