"""Workloads, and how one training step of them is measured: work, errors, memory. The arms are in `peers.py`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torchdiffeq
from torch import nn
from torch.profiler import ProfilerActivity, profile

import neuralode

RATE = 1e-6
"""Learning rate of the SGD step that every arm takes; small, so that the problem stays the same over the repeats."""


TURN = 0.02
"""Seconds of steps that are not timed at the beginning of an arm's turn, and then of those that are."""


@dataclass(frozen=True)
class Workload:
    """A field, states to start from, and how to solve; dopri5 unless it takes fixed steps."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Shape of the state, the batch first."""
    times: int = 2
    end: float = 1.0
    method: str = "dopri5"
    rtol: float = 0.0
    atol: float = 0.0
    steps: int = 0
    """Number of fixed steps, for a method without error control."""
    spread: bool = False
    """The samples differ so much that steps of their own may pay."""
    reference: str = "dopri8"
    most_steps: int = 64
    """Bound on the steps, for diffrax: it sets up memory for so many."""
    device: str = "cpu"
    field: nn.Module = dataclasses.field(init=False)
    y0: torch.Tensor = dataclasses.field(init=False)
    ts: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        object.__setattr__(self, "field", self.build().to(self.device))
        object.__setattr__(self, "y0", torch.randn(self.shape).to(self.device))
        object.__setattr__(self, "ts", torch.linspace(0, self.end, self.times).to(self.device))

    @property
    def step_size(self) -> float | None:
        return self.end / self.steps if self.steps else None


@dataclass
class Answer:
    """What one arm computes for a workload before any training, and what that took."""

    loss: float
    gradient: torch.Tensor
    """All parameters in one vector, float64."""
    forward: int | None = None
    """Evaluations of the field in the forward pass."""
    backward: int | None = None
    """Further evaluations in the backward pass."""
    accepted: int | None = None


class Arm(Protocol):
    """One library at one setting, ready to train on one workload."""

    def answer(self) -> Answer: ...

    def forward(self) -> None:
        """A solve without gradients; returns when it is done."""

    def step(self) -> None:
        """One training step; returns when it is done."""

    def peak(self) -> int:
        """Bytes that a training step takes at its peak, over those held before it."""


def loss_of(later: torch.Tensor) -> torch.Tensor:
    """Mean square of the states after the first output time."""
    return later.square().mean()


Solve = Callable[[nn.Module, Workload], tuple[torch.Tensor, int | None]]
"""(field, workload) → states after the first time [T - 1, *shape], and the number of accepted steps if known."""


class TorchArm:
    """An arm whose solve PyTorch differentiates, with a copy of the field of its own.

    Args:
        count: a solve that counts the same work if the measured one cannot be watched, as a compiled one.
    """

    def __init__(self, work: Workload, solve: Solve, count: Solve | None = None):
        self.work, self.solve, self.count = work, solve, count or solve
        self.field = copy.deepcopy(work.field)
        self.optimizer = torch.optim.SGD(self.field.parameters(), lr=RATE)

    def forward(self) -> None:
        with torch.no_grad():
            self.solve(self.field, self.work)
        wait_for(self.work.device)

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(self.solve(self.field, self.work)[0]).backward()
        self.optimizer.step()
        wait_for(self.work.device)

    def answer(self) -> Answer:
        watched = copy.deepcopy(self.work.field)
        calls = accepted = 0

        def on_call(*_: object) -> None:
            nonlocal calls
            calls += 1

        def on_accept(*_: object) -> None:
            nonlocal accepted
            accepted += 1

        watched.register_forward_pre_hook(on_call)
        watched.callback_accept_step = on_accept  # torchdiffeq calls it
        later, told = self.count(watched, self.work)
        forward = calls
        loss = loss_of(later)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in watched.parameters()]).double()
        return Answer(loss.item(), gradient, forward, calls - forward, told or self.work.steps or accepted or None)

    def peak(self) -> int:
        return peak_bytes(self.step, self.work.device)


def wait_for(device: str) -> None:
    """Returns when the device has done all that it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """Most bytes that PyTorch's allocator held at once during `step`, over those it held before.

    Every tensor counts: activations, checkpoints, temporary results and gradients.
    """
    step()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        step()
    held = peak = 0
    assert trace.profiler is not None
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def reference(work: Workload) -> Answer:
    """The exact ODE's answer in float64, at tolerances far below those of the arms: torchdiffeq's, or, where samples
    of widely different stiffness would keep it busy for minutes, our dop853."""
    exact, y0, ts = copy.deepcopy(work.field).double(), work.y0.double(), work.ts.double()
    if work.spread:
        states = neuralode.solve(exact, y0, ts, method="dop853", rtol=1e-11, atol=1e-12).ys
    else:
        states = torchdiffeq.odeint(exact, y0, ts, method=work.reference, rtol=1e-10, atol=1e-12)
    loss = loss_of(states[1:])
    loss.backward()
    return Answer(loss.item(), torch.cat([p.grad.flatten() for p in exact.parameters()]))


def errors(answer: Answer, exact: Answer) -> tuple[float, float]:
    """Relative errors of the loss and of the gradient, the latter in the L2 norm."""
    off = (answer.gradient.cpu() - exact.gradient.cpu()).norm() / exact.gradient.norm()
    return abs(answer.loss - exact.loss) / exact.loss, float(off)


def times(steps: dict[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, float]:
    """Median seconds of the step of each arm; the arms take turns in random order.

    In training a step follows thousands like it. So the steps at the beginning of a turn, during which caches, clock
    and threads recover from the arm before, are not timed: 20 ms of them, at least one; then 20 ms, at least two, are.

    Args:
        budget: seconds for all of it; heavy rows get fewer than `repeats`, but at least five.
    """
    chance, seconds = random.Random(0), {name: [] for name in steps}
    for _ in range(2):
        began = time.perf_counter()
        for step in steps.values():
            _steps(step, 0.0, 1)
        a_step_of_each = time.perf_counter() - began
    order = list(steps)
    for _ in range(max(min(5, repeats), min(repeats, int(budget / (3 * a_step_of_each + 2 * TURN * len(order)))))):
        chance.shuffle(order)
        gc.collect()
        for name in order:
            _steps(steps[name], TURN, 1)
            seconds[name] += _steps(steps[name], TURN, 2)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _steps(step: Callable[[], object], duration: float, least: int) -> list[float]:
    """Seconds of each of the steps that fit into a duration, or of the least number of them."""
    found: list[float] = []
    start = end = time.perf_counter()
    while end < start + duration or len(found) < least:
        begin = end
        step()
        end = time.perf_counter()
        found.append(end - begin)
    return found
