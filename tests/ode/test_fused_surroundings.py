"""Solves by the kernels in threads, in processes and under interrupts, and how accurate single precision is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

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
import torch, neuralode
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


def test_single_precision_is_as_accurate_as_the_steppers() -> None:
    """On the same steps, against double precision: states and gradients of random networks."""
    sums = torch.zeros(2, dtype=torch.float64)
    for seed in range(60):
        torch.manual_seed(seed)
        features, rows, steps = (int(torch.randint(1, high, ())) for high in (7, 60, 30))
        activation = ["tanh", "softplus", "silu", "relu", "elu"][seed % 5]
        widths = [int(w) for w in torch.randint(1, 48, (1 + seed % 3,))]
        field = MLPField(features, widths, activation, time=bool(seed % 2)).float()
        for parameter in field.parameters():
            parameter.data *= 0.5 + 2 * torch.rand(())
        y0, method = 2 * torch.randn(rows, features), ["euler", "rk4", "midpoint", "heun3"][seed % 4]
        found = {}
        for name, dtype in (("fused", torch.float32), ("stepper", torch.float32), ("exact", torch.float64)):
            engine = "stepper" if name == "exact" else name
            start = y0.to(dtype).requires_grad_()
            ys, gradients, _ = outcome(engine, field.to(dtype), start, [0.0, steps / 64, steps / 16], method=method,
                                       step_size=1 / 16)  # fmt: skip
            found[name] = [x.detach().double() for x in (ys, *gradients)]
            field.float()
        for ours, theirs, exact in zip(*found.values(), strict=True):
            scale = exact.abs().max() + 1e-3
            errors = [float((x - exact).square().mean().sqrt() / scale) for x in (ours, theirs)]
            assert errors[0] <= 4 * errors[1] + 8 * torch.finfo(torch.float32).eps, (seed, errors)
            sums += torch.tensor(errors).double()
    assert sums[0] <= 2 * sums[1]


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
