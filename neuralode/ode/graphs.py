"""The step of a field, recorded as a CUDA graph: forwards, and backwards as the exact gradient of an accepted step.

Around the field's own operations a step has a handful of fused ones (`neuralode.kernels.cuda.stages`).
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence

import torch

from neuralode.errors import UsageError
from neuralode.kernels.cuda.compiler import CompileError
from neuralode.kernels.cuda.driver import DriverError
from neuralode.kernels.cuda.recorder import Recorder
from neuralode.kernels.cuda.solve import Machine
from neuralode.kernels.cuda.stages import DIRECTION, KEPT, SIZE, Control, H, Progress, Stages, T
from neuralode.kernels.task import SUCCESS
from neuralode.ode.clock import Clock
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.fused_engine import limits_of, method_data
from neuralode.ode.observed_field import Field
from neuralode.ode.packing import Packing, lasting
from neuralode.ode.parameters import HeldField, StandIns
from neuralode.ode.readings import Kept, Reading, half_way, read
from neuralode.ode.solution import Stats
from neuralode.ode.stepper import CountedField, Integration, Settings
from neuralode.ode.unchanging import NotCaptured, unchanging

CHUNK = 8
"""Most steps between two looks of the host."""
_MOST_SLOPES = 2**28
"""Bytes that the slopes of a chunk may take."""


class Graphs:
    """The step of a field, forwards and backwards, ready to be repeated.

    Args:
        times: of a solve, in which the field is tried; there may be others between the first and the last.

    Raises:
        NotCaptured: where that cannot be, or would not give what the field does.
    """

    def __init__(self, field: Field, y0: torch.Tensor, times: tuple[float, ...], settings: Settings,
                 machine: Machine, records: bool):  # fmt: skip
        method = settings.method
        assert isinstance(method, RungeKutta)
        self._field = weakref.ref(field)  # graphs that are kept for a field do not keep it
        self.settings, self.method = settings, method
        self.solves = 0
        self._busy = threading.Lock()
        self.reads = len(times) > 2
        self._most = _chunk_of(y0, len(method.tableau.c)) if self.reads else CHUNK
        self._chunk = self._most
        self._same = unchanging(field, times[0], y0)
        data, like = method_data(method.tableau), y0.detach().contiguous()
        try:
            held, time = HeldField(field, (), Packing(y0)), y0.new_full((), times[0])
            self.inputs = held.all_inputs(lambda: field(time, like))[0] if records else []
            self.records = records and (y0.requires_grad or bool(self.inputs))
            # their gradients must not pass through the nodes, nor the hooks, that the user's graphs have
            self._stand_ins = StandIns(self.inputs)
            self.reached = [False] * len(self.inputs)
            recorder = Recorder(y0.device)
            with torch.no_grad():
                self.ops = Stages(machine, data, limits_of(settings), like, self._most, self.records, self.reads)
                self._prepare(y0, times)
                self._begin = recorder(self._first_step)
                self.back = Stages(machine, data, limits_of(settings), like, 0, False, self.reads)
                self.back.y.copy_(y0), self.back.control.copy_(self.ops.control)
                self._step = recorder(self._take_step)
                self.totals = [torch.zeros_like(x) for x in self.inputs]
                self._pull = recorder(self._pull_back) if self.records else None
        except (CompileError, DriverError, RuntimeError, UsageError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise NotCaptured(f"it cannot be recorded ({said[0][:200]})") from error
        self._check(y0, times)

    def _check(self, y0: torch.Tensor, times: tuple[float, ...]) -> None:
        """Compares a recorded step, and its gradient, with the same in plain PyTorch."""
        self._start(y0, times)
        begun = self.ops.read()
        self._step()
        y, t, h = y0.detach().requires_grad_(self.records), begun.progress.t, begun.h
        with torch.set_grad_enabled(self.records), self._stand_ins:
            step = self.method.step(self.field, t, h, y, self.field(y0.new_full((), t), y), None)
            outputs = [self.method.interpolant(step, self.field)(0.5)] if self.reads else []
            ys = torch.stack([*outputs, step.y1])
        found, wanted = [self.ops.end], [step.y1.detach()]
        if self.records:
            cotangents = torch.linspace(0, 1, ys.numel() + 1, dtype=ys.dtype, device=ys.device)[1:].reshape(ys.shape)
            moving = [y, *self._stand_ins.tensors]
            gradients = torch.autograd.grad(ys, moving, cotangents, allow_unused=True)
            wanted += [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, moving, strict=True)]
            starts, sizes = torch.tensor([[t, t + h], [h, 0.0]], dtype=torch.double, device=y.device)
            kept = Kept(torch.stack([y, step.y1]).detach(), starts, sizes)
            if self.reads:
                kept.readings[0] = half_way(self.method, h, y)
            start, _ = self.pull([kept], cotangents, Stats("captured", "", ""))
            found += [start, *self.totals]
        lengths = [float(x.norm()) for x in wanted]
        precision = 1e-3 if y0.dtype == torch.float32 else 1e-9
        apart = [float((x - right).norm()) for x, right in zip(found, wanted, strict=True)]
        for off, length in zip(apart, lengths, strict=True):
            if not off <= precision * (length + 1e-3 * max(lengths)):
                raise NotCaptured("its recorded step is not the field's")

    def hold(self, field: Field) -> bool:
        """Whether they are of this field, and it is as it was when they were made."""
        return self._field() is field and self._same.holds()

    def solve(self, y0: torch.Tensor, times: tuple[float, ...], stats: Stats) -> tuple[torch.Tensor, list[Kept]]:
        """The states at the times after the first, [T - 1, *shape], and the starts of the steps."""
        ops = self.ops
        kept: list[Kept] = []
        states: list[torch.Tensor] = []
        self.solves += 1
        with torch.no_grad(), self._busy:
            self._start(y0, times)
            steps = self._chunk
            while True:
                ops.control[KEPT].zero_()
                for _ in range(steps):
                    self._step()
                control = ops.read()  # the one wait of a chunk
                piece = Kept(*(x[: control.kept].clone() for x in (ops.kept_y, ops.kept_t, ops.kept_h)))
                if self.reads:
                    states += read(self.method, piece, ops.kept_k, times, 1 + sum(len(x) for x in states))
                if not self.records:
                    piece.y = ops.kept_y[:0]
                kept.append(piece)
                if control.done:
                    break
                steps = self._most
            y, progress = ops.y.clone(), control.progress
            self._chunk = min(self._most, max(1, progress.tried))  # the next solve will be much like this one
        if control.status != SUCCESS or not torch.isfinite(y).all():
            raise NotCaptured("the solve failed, and the stepper says why")
        stats.engine, stats.reason = "captured", f"{stats.reason}; its steps are recorded".removeprefix("; ")
        stats.nfe = 1 + (self.settings.first_step is None) + progress.tried * ops.evaluated
        stats.accepted, stats.rejected = progress.accepted, progress.tried - progress.accepted
        stats.step_sizes = torch.cat([piece.h for piece in kept]).abs().tolist()
        if kept[-1].readings[-1] is not None:  # they lean on the slope at the end, which belongs to no step
            kept.append(Kept(y[None], kept[-1].t[-1:] + kept[-1].h[-1:], torch.zeros_like(kept[-1].h[-1:])))
        return torch.cat([*states, y[None]]), kept

    def _start(self, y0: torch.Tensor, times: tuple[float, ...]) -> None:
        self._prepare(y0, times)
        with torch.no_grad():
            self._begin()

    def _prepare(self, y0: torch.Tensor, times: tuple[float, ...]) -> None:
        start, end = times[0], times[-1]
        progress = Progress(t=start, end=end, size=abs(self.settings.first_step or 0.0), last=1.0, before=1.0, next=1)
        with torch.no_grad():
            self.ops.y.copy_(y0)
            self.ops.begin(Control(progress=progress, direction=1.0 if end > start else -1.0))

    def pull(self, kept: Sequence[Kept], cotangents: torch.Tensor,
             stats: Stats) -> tuple[torch.Tensor, list[torch.Tensor | None]]:  # fmt: skip
        """The gradients of the state at the start and of the inputs; None for an input that the field does not use.

        Args:
            cotangents: of the states at the times after the first, [T - 1, *shape].
        """
        back = self.back
        assert self._pull is not None
        steps = [(piece, n) for piece in kept for n in range(len(piece.t))]
        with self._busy:
            back.adjoint.copy_(cotangents[-1])
            for total in self.totals:
                total.zero_()
            for i in reversed(range(len(steps))):
                piece, n = steps[i]
                before = steps[i - 1][0].readings[steps[i - 1][1]] if i else None
                read_here = self._take_readings(piece.readings[n], before, cotangents) if self.reads else None
                back.y.copy_(piece.y[n])
                back.control[T].copy_(piece.t[n])
                back.control[H].copy_(piece.h[n])
                self._pull()
                if read_here is not None:
                    back.adjoint.add_(read_here)
                stats.nfe_backward += back.evaluated
            totals = zip(self.totals, self.reached, strict=True)
            return back.adjoint.clone(), [total.clone() if reached else None for total, reached in totals]

    def _take_readings(self, here: Reading | None, before: Reading | None,
                       cotangents: torch.Tensor) -> torch.Tensor | None:  # fmt: skip
        """Puts what output times give a step's slopes where its reverse finds it; what they give its start.

        Args:
            here, before: the output times of the step, and of the one before, whose last slope is this one's first.
        """
        extra, to_start = self.back.extra.zero_(), None
        if here is not None:
            given = cotangents[here.places]
            extra += here.to_slopes(given)[: len(extra)]
            to_start = given.sum(0)
        if before is not None:
            extra[0] += before.to_slopes(cotangents[before.places])[-1]
        return to_start

    def again(self, y0: torch.Tensor, times: tuple[float, ...], kept: Sequence[Kept]) -> torch.Tensor:
        """The states of `solve` by operations that autograd knows: for gradients of gradients."""
        starts = [t for piece in kept for t, h in zip(piece.t.tolist(), piece.h.tolist(), strict=True) if h]
        settings = dataclasses.replace(self.settings, grid=(*starts, times[-1]))
        clock = Clock(torch.tensor(times, dtype=torch.double), lands=not self.reads)
        integration = Integration(
            settings, CountedField(self.field, (), lambda dy, y: None), clock, y0, Stats("captured", "", "")
        )
        integration.run()
        return torch.stack(integration.outputs[1:])

    def field(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dy/dt, by the field itself."""
        field = self._field()
        if field is None:
            raise UsageError("the field of this solve is gone, and second derivatives evaluate it; keep it.")
        return lasting(field(t, y))

    def _first_step(self) -> None:
        """The slope at the start, and the size of the first step (Hairer, Nørsett, Wanner, I, section II.4)."""
        ops, tolerance = self.ops, self.settings.tolerance
        time, y = ops.stage(0, [])
        f0 = self.field(time, y)
        ops.slope.copy_(f0)
        if self.settings.first_step is None:
            scale = y.abs() * tolerance.rtol + tolerance.atol

            def norm(x: torch.Tensor) -> torch.Tensor:
                return tolerance.norm(x / scale).double()

            size, slope = norm(y), norm(f0)
            h0 = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope).nan_to_num(1e-6)
            h = torch.copysign(h0, ops.control[DIRECTION]).to(y.dtype)
            bend = norm(self.field(time + h, y + h * f0) - f0) / h0
            steepest = torch.maximum(slope, bend)
            flat = torch.clamp(h0 * 1e-3, min=1e-6)
            h1 = torch.where(steepest <= 1e-15, flat, (0.01 / steepest) ** (1 / self.method.order))
            ops.control[SIZE].copy_(torch.where(bend.isfinite(), torch.minimum(100 * h0, h1), h0).nan_to_num(1e-6))
        ops.first()

    def _take_step(self) -> None:
        ops = self.ops
        slopes = [ops.slope] if ops.method.fsal else []
        for i in range(len(slopes), ops.stages):
            slopes.append(self.field(*ops.stage(i, slopes)).contiguous())
        ops.finish(slopes)
        ops.move(slopes)

    def _pull_back(self) -> None:
        """Evaluates a step again from its start, and takes the adjoint from its end to there."""
        back = self.back
        points: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        for i in range(back.evaluated):
            time, y = back.stage(i, slopes)
            points.append(y.detach().requires_grad_())
            with torch.enable_grad(), self._stand_ins:
                values.append(self.field(time, points[-1]))
            slopes.append(values[-1].detach().contiguous())
        adjoints: list[torch.Tensor | None] = [None] * back.stages
        for i in reversed(range(back.evaluated)):
            gradient = back.stage_bwd(i, adjoints)
            found: Sequence[torch.Tensor | None] = [None] * (1 + len(self.inputs))
            if values[i].requires_grad:
                moving = [points[i], *self._stand_ins.tensors]
                found = torch.autograd.grad(values[i], moving, gradient, allow_unused=True)
            adjoints[i] = torch.zeros_like(points[i]) if found[0] is None else found[0].contiguous()
            for n, more in enumerate(found[1:]):
                if more is not None:
                    self.totals[n].add_(more)
                    self.reached[n] = True
        back.start_bwd(adjoints)


def _chunk_of(y0: torch.Tensor, slopes: int) -> int:
    """Steps of a chunk whose slopes are kept."""
    return max(1, min(CHUNK, _MOST_SLOPES // (slopes * y0.numel() * y0.element_size())))
