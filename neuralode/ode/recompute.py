"""The exact gradient in little memory: steps are recomputed in the backward pass from saved states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.clock import Accepted, RowStep
from neuralode.ode.explicit import Step, moment
from neuralode.ode.parameters import Autocast, HeldField, InnerGradient, refuse_another_field
from neuralode.ode.rows import Loop
from neuralode.ode.solution import Stats
from neuralode.ode.stepper import step_estimates
from neuralode.ode.tolerance import transformed


class Checkpoints:
    """The states at the starts of some steps: of every step, or of at most `limit`, evenly thinned as steps come in."""

    def __init__(self, limit: int | None):
        self.limit, self.stride = limit, 1
        self.states: dict[int, torch.Tensor] = {}

    def offer(self, step: int, y: torch.Tensor) -> None:
        if step % self.stride:
            return
        self.states[step] = y
        if self.limit is not None and len(self.states) > self.limit:
            self.stride *= 2
            self.states = {at: state for at, state in self.states.items() if at % self.stride == 0}


def solve_recomputing(
    integration: Loop,
    evaluate: HeldField,
    inputs: Sequence[torch.Tensor],
    limit: int | None,
    stats: Stats,
) -> list[torch.Tensor]:
    """Finishes an integration without keeping graphs; the backward pass recomputes each step and takes its VJP.

    Memory is O(steps · state), and with `limit` states kept O(limit · state · log steps), for one more (with `limit`,
    up to log steps more) evaluation of each stage.

    Args:
        integration: paused, at the state from which on no graph is kept.
        evaluate: the field in the backward pass, with the parameters that the forward pass had.
        inputs: every further tensor that the field depends on and that wants a gradient.

    Returns:
        The remaining output states, the final state, and, if the settings ask for them, the two sums of estimates.
    """
    ts = integration.clock.ts
    if transformed():
        raise UsageError(
            "recomputing steps (checkpoint) does not work inside torch.func transforms or with forward-mode "
            "differentiation; give checkpoint='never'."
        )
    return list(_Recomputed.apply(integration, evaluate, limit, stats, integration.y, ts, *inputs))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, integration: Loop, evaluate: HeldField, limit: int | None, stats: Stats,
                y: torch.Tensor, ts: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # fmt: skip
        before, first = len(integration.outputs), len(integration.accepted)
        kept = Checkpoints(limit)
        integration.detach()
        autocast = Autocast(y)
        with autocast.restored(), evaluate.solving(inputs):
            integration.run(on_step=lambda step: kept.offer(len(integration.accepted) - first, step.y0))
        ctx.steps = integration.accepted[first:]
        ctx.kept, ctx.limit, ctx.settings, ctx.evaluate = kept.states, limit, integration.settings, evaluate
        ctx.clock, ctx.first_output, ctx.stats = integration.clock, before, stats
        # the constants, and y, are saved so that autograd notices if they were changed in place since
        ctx.save_for_backward(ts, *inputs, y, *evaluate.constants)
        ctx.inputs, ctx.autocast, ctx.end = inputs, autocast, integration.y
        results = [state.detach() for state in (*integration.outputs[before:], integration.y)]
        if ctx.settings.estimates:
            sums = (integration.extras.error_sum, integration.extras.stiffness_sum)
            results += [y.real.new_zeros(()) if s is None else s.detach() for s in sums]
        # one tensor may stand for two results, and autograd wants them apart
        return tuple(result.clone() for result in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise UsageError(
                "second derivatives through recomputed steps are not available; give checkpoint='never' to the solve."
            )
        ts, inputs = ctx.saved_tensors[0], ctx.inputs
        # the input that wants no gradient is not differentiated
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad[6:], strict=True) if needed]
        ctx.evaluate.begin_backward()
        sweep = _Sweep(ctx, ts, inputs, wanted, cotangents)
        with ctx.autocast.restored(), ctx.evaluate.as_solved():
            gradient = sweep.back(0, len(ctx.steps), dict(ctx.kept))
        found = iter(sweep.totals)
        rest = [next(found) if needed else None for needed in ctx.needs_input_grad[6:]]
        times = sweep.times_total if ctx.needs_input_grad[5] else None
        return (None, None, None, None, gradient, times, *rest)


class _Sweep:
    """One backward pass over the frozen grid."""

    def __init__(self, ctx: Any, ts: torch.Tensor, known: Sequence[torch.Tensor], inputs: list[torch.Tensor],
                 cotangents: Sequence[torch.Tensor]):  # fmt: skip
        self.method, self.estimates = ctx.settings.method, ctx.settings.estimates
        self.steps: list[Accepted] | list[RowStep] = ctx.steps
        self.limit, self.stats = ctx.limit, ctx.stats
        self.counted = _Counted(ctx.evaluate)
        self.ts = ts.detach().requires_grad_(ctx.needs_input_grad[5])
        self.inner = InnerGradient(inputs, known)
        with torch.enable_grad():
            self.clock = ctx.clock.with_times(self.ts)
        self.end: torch.Tensor | None = ctx.end.detach()
        self.totals: list[torch.Tensor | None] = [None] * len(inputs)
        self.times_total = torch.zeros_like(ts) if ctx.needs_input_grad[5] else None
        *outputs, self.gradient = cotangents[:-2] if self.estimates else cotangents
        self.cotangents = {ctx.first_output + i: g for i, g in enumerate(outputs)}
        self.sums = list(cotangents[-2:]) if self.estimates else []

    def back(self, low: int, high: int, kept: dict[int, torch.Tensor]) -> torch.Tensor:
        """Takes the gradient from the end of step high - 1 to the start of step `low`, which is in `kept`."""
        starts = sorted(at for at in kept if low <= at < high)
        for start, end in reversed(list(zip(starts, [*starts[1:], high], strict=True))):
            y = kept.pop(start)
            if end - start == 1:
                self._through(start, y)
            else:
                self.back(start, end, self._recompute(start, end, y))
        return self.gradient

    def _recompute(self, low: int, high: int, y: torch.Tensor) -> dict[int, torch.Tensor]:
        """The states at the starts of up to `limit` of the steps low to high - 1, evenly spread."""
        stride = -(-(high - low) // max(2, self.limit or high))
        states, f0 = {low: y}, None
        last = low + (high - low - 1) // stride * stride
        with torch.no_grad():
            for at in range(low, last):
                step = self._take(at, y, f0)
                y, f0 = step.y1, step.f1
                if (at + 1 - low) % stride == 0:
                    states[at + 1] = y
        return states

    def _take(self, index: int, y: torch.Tensor, f0: torch.Tensor | None, complete: bool = True) -> Step:
        record = self.steps[index]
        t, h = self.clock.place(record)
        if f0 is None:
            f0 = self.counted(moment(t, y), y)
        return self.method.step(self.counted, t, h, y, f0, record.plan, complete)

    def _through(self, index: int, y: torch.Tensor) -> None:
        """Recomputes one step with its graph and pulls the gradient back through it."""
        record = self.steps[index]
        with self.inner.recording():
            y = y.detach().requires_grad_()
            before = self.counted.calls
            # the slope at the end of the step belongs to the next one, unless dense output or an estimate reads it
            complete = self.estimates or bool(self.clock.reads_densely(record))
            step = self._take(index, y, None, complete)
            results = [step.y1, *self.clock.read(self.method, step, record, self.counted)]
            cotangents = [self.gradient, *(self.cotangents[output] for output in record.outputs)]
            if self.estimates:
                estimates = step_estimates(self.method, step, self.counted)
                for value, cotangent in zip(estimates, self.sums, strict=True):
                    if value is not None:
                        results.append(value)
                        cotangents.append(cotangent)
        self.stats.nfe_backward += self.counted.calls - before
        if self.end is not None:
            refuse_another_field(step.y1.detach(), self.end)
            self.end = None
        self.inner.check(results, y, self.ts)
        sources = [y, *self.inner.tensors, *([self.ts] if self.times_total is not None else [])]
        live = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
        gradients = torch.autograd.grad([r for r, _ in live], sources, [c for _, c in live], allow_unused=True)
        self.gradient = torch.zeros_like(y) if gradients[0] is None else gradients[0]
        for i, gradient in enumerate(gradients[1 : 1 + len(self.totals)]):
            self.totals[i] = _sum(self.totals[i], gradient)
        if self.times_total is not None and gradients[-1] is not None:
            self.times_total += gradients[-1]


def _sum(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    if more is None:
        return total
    return more if total is None else total + more


class _Counted:
    def __init__(self, evaluate: HeldField):
        self.evaluate, self.calls = evaluate, 0

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.evaluate(t, y)
