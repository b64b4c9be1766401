"""Solves by the kernels in threads, in processes and under interrupts, and how accurate single precision is."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from neuralode.errors import UsageError
from neuralode.kernels.library import library, why_not
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import solve
from tests.ode.test_fused_engine import EXACTLY, agree, draw, leaf, net, outcome

pytestmark = pytest.mark.skipif(library() is None, reason=why_not())


@pytest.mark.parametrize("kwargs", [{}, {"per_sample": True}, {"method": "rk4", "step_size": 0.1},
                                    {"memory_budget": 0}, {"memory_budget": 200_000}], ids=str)  # fmt: skip
def test_threads_agree_and_runs_repeat(kwargs: dict[str, Any]) -> None:
    field, y0, found = net(), leaf(1000, 2), []
    try:
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            ys, gradients, _ = outcome("fused", field, y0, [0.0, 0.5, 1.0], **kwargs)
            found.append([ys, *gradients])
    finally:
        torch.set_num_threads(1)
    for others, exactly in ((found[1], False), (found[2], False), (found[3], True)):
        assert torch.equal(found[0][0], others[0])
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} if exactly else EXACTLY))
    assert all(torch.equal(one, other) for one, other in zip(found[1], found[2], strict=True))


def test_python_threads_at_once() -> None:
    fields = [net(seed=i) for i in range(8)]

    def work(i: int) -> list[torch.Tensor]:
        ys, gradients, _ = outcome("fused", fields[i], draw(50, 2, seed=i).requires_grad_(), [0.0, 1.0], rtol=1e-8)
        return [ys, *gradients]

    alone = [work(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for i, found in enumerate(pool.map(work, list(range(8)) * 6)):
            assert all(torch.equal(one, other) for one, other in zip(found, alone[i % 8], strict=True))


class Solved(Dataset[Any]):
    """Each item is the gradient of a solve."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return outcome("fused", net(), draw(100, 2, seed=index).requires_grad_(), [0.0, 1.0])[1][0]


@pytest.mark.parametrize("threads", [1, 2])
def test_workers_of_a_data_loader(threads: int) -> None:
    torch.set_num_threads(threads)
    here = [Solved()[i] for i in range(6)]
    loader = DataLoader(Solved(), num_workers=2, multiprocessing_context="fork", batch_size=None, timeout=60)
    for one, other in zip(loader, here, strict=True):
        torch.testing.assert_close(one, other, **EXACTLY)


LONG = """
import signal, torch, neuralode
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job may ignore
torch.manual_seed(0)
field = neuralode.nn.MLPField(2, [64, 64]).double()
neuralode.solve(field, torch.ones(8, 2).double(), [0.0, 0.1])
print("begun", flush=True)
neuralode.solve(field, torch.ones(8, 2).double(), [0.0, {end}], engine="fused", max_steps=2**40, {more})
print("done", flush=True)
"""


@pytest.mark.parametrize(("end", "more"), [
    (1e7, "rtol=1e-13, atol=1e-13"), (1e7, "rtol=1e-13, atol=1e-13, per_sample=True"),
    (1e3, "method='rk4', step_size=1e-3"),
], ids=["shared", "per sample", "fixed"])  # fmt: skip
def test_interrupt(end: float, more: str) -> None:
    """Ctrl-C in the middle of a long solve ends the program."""
    child = subprocess.Popen([sys.executable, "-c", LONG.format(end=end, more=more)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=5)
    finally:
        child.kill()
    assert "KeyboardInterrupt" in err
    assert "done" not in out


def problem(features: int, widths: list[int], activation: str, time: bool, gain: float, rows: int, size: float,
            seed: int) -> tuple[MLPField, torch.Tensor]:  # fmt: skip
    """A random network, weights included, and the states to start from."""
    torch.manual_seed(seed)
    field = MLPField(features, widths, activation, time=time)
    for parameter in field.parameters():
        parameter.data *= gain
    return field, size * torch.randn(rows, features)


PROBLEMS = st.builds(
    problem, st.integers(1, 8), st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.sampled_from(["tanh", "softplus", "silu", "relu", "elu"]), st.booleans(), gain=st.floats(0.3, 2.5),
    rows=st.integers(1, 70), size=st.floats(0.1, 3.0), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
METHODS = st.one_of(
    st.fixed_dictionaries({"method": st.sampled_from(["euler", "midpoint", "heun3", "rk4"]),
                           "step_size": st.floats(0.02, 0.2)}),
    st.fixed_dictionaries({"method": st.sampled_from(["bosh3", "dopri5", "tsit5"]), "rtol": st.floats(1e-4, 1e-2),
                           "atol": st.floats(1e-5, 1e-3), "per_sample": st.booleans()}),
)  # fmt: skip


SHARPLY = {"method": "dop853", "rtol": 1e-8, "atol": 1e-9}


@settings(max_examples=200, deadline=None, derandomize=True, print_blob=True)
@given(PROBLEMS, st.floats(0.1, 2.0), METHODS)
def test_single_precision_is_as_accurate_as_the_steppers(
    problem: tuple[MLPField, torch.Tensor], span: float, method: dict[str, Any]
) -> None:
    """The error against double precision, of states and of all gradients, is at most twice that of plain PyTorch.

    PyTorch's is the largest over states that are a rounding apart, for any one may be right by chance. Fixed steps are
    compared with the same steps in double precision, adaptive ones with the solution of the equation.
    """
    field, y0 = problem
    eps = torch.finfo(torch.float32).eps

    def solved(engine: str, dtype: torch.dtype, factor: float, how: dict[str, Any]) -> list[torch.Tensor]:
        start = (factor * y0).to(dtype).requires_grad_()
        ys, gradients, _ = outcome(engine, field.to(dtype), start, [0.0, span / 3, span], **how)
        return [ys.detach().double(), torch.cat([x.flatten() for x in gradients]).double()]

    ours = solved("fused", torch.float32, 1.0, method)
    plain = [solved("stepper", torch.float32, 1 + shift * eps, method) for shift in (-1, 0, 1)]
    exact = solved("stepper", torch.float64, 1.0, SHARPLY if "rtol" in method else method)
    for i, true in enumerate(exact):
        theirs = max((found[i] - true).norm() for found in plain)
        assert (ours[i] - true).norm() <= 2 * theirs + 8 * eps * true.norm()


@pytest.mark.parametrize("kwargs", [{}, {"method": "rk4", "step_size": 0.05}, {"per_sample": True}], ids=str)
def test_little_memory(kwargs: dict[str, Any]) -> None:
    t = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    found = []
    for memory in ({}, {"memory_budget": 0}, {"checkpoint": "always"}, {"memory_budget": 400_000}):
        how_far = {"rtol": 1e-8, "atol": 1e-8, **kwargs}
        found.append(outcome("fused", net(), leaf(300, 2), t, **memory, **how_far))
    for _, gradients, stats in found[1:]:
        agree(gradients, found[0][1], **EXACTLY)
        assert stats.kept_bytes < found[0][2].kept_bytes / (1 if stats is found[3][2] else 5)


def test_autocast_falls_back_except_in_blocks() -> None:
    field, y0 = net().float(), draw(5, 2, dtype=torch.float32)
    block = ODEBlock(field)
    with torch.autocast("cpu", torch.bfloat16):
        stats, inside = solve(field, y0, [0.0, 1.0], method="rk4", step_size=0.5).stats, block(y0)
    assert (stats.engine, stats.reason) == ("stepper", "not the kernels: autocast is on")
    assert torch.equal(inside, block(y0))


@pytest.mark.parametrize("kwargs", [{}, {"method": "rk4", "step_size": 0.2}, {"per_sample": True},
                                    {"gradient": "adjoint"}, {"checkpoint": 2}], ids=str)  # fmt: skip
@pytest.mark.parametrize("engine", ["auto", "stepper"])
def test_activation_checkpointing_from_the_first_solve_on(engine: str, kwargs: dict[str, Any]) -> None:
    new, y0, found = net(), leaf(5, 2), []
    for checkpointed in (True, False):
        field = copy.deepcopy(new)

        def solved(y: torch.Tensor, field: torch.nn.Module = field) -> torch.Tensor:
            return solve(field, y, [0.0, 1.0], engine=engine, **kwargs).ys

        for _ in range(2):
            ys = checkpoint(solved, y0, use_reentrant=False) if checkpointed else solved(y0)
            found.append(torch.autograd.grad(ys.square().sum(), [y0, *field.parameters()]))
    for gradients in found[1:]:
        agree(gradients, found[0], **EXACTLY)


def test_many_gradients_at_once() -> None:
    field, y0 = net(), leaf(3, 2)
    found = [
        torch.autograd.functional.jacobian(
            lambda y, engine=engine: solve(field, y, [0.0, 1.0], engine=engine).final, y0, vectorize=vectorize
        )
        for engine, vectorize in (("fused", False), ("fused", True), ("stepper", True))
    ]
    agree(found[1:], [found[0], found[0]], rtol=1e-8, atol=1e-10)


def test_a_recorded_solve_is_the_steppers() -> None:
    field, y0 = net().requires_grad_(False), draw(3, 2)
    traced = torch.jit.trace(lambda y: solve(field, y, [0.0, 1.0], method="rk4", step_size=0.5).final, y0)
    again = 2 * y0
    torch.testing.assert_close(traced(again), solve(field, again, [0.0, 1.0], method="rk4", step_size=0.5).final)


def test_times_in_another_precision_that_want_a_gradient() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert t.dtype == y.dtype
        return torch.cat([y, t.expand(len(y), 1)], dim=1) @ torch.ones(3, 2) * torch.sin(y)

    for engine in ("fused", "stepper"):
        t = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
        try:
            solve(field, draw(3, 2).float(), t, engine=engine).ys.sum().backward()
        except UsageError:  # the kernels need not know it
            assert engine == "fused"


def test_parts_of_a_tuple_may_be_changed() -> None:
    states = solve(lambda t, y: (-y[0], -y[1]), (draw(3, 2), draw(3, 1)), [0.0, 1.0], engine="stepper").ys
    with torch.no_grad():
        states[0][0] = 0
    assert float(states[0][0].sum()) == 0
