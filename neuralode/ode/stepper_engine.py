"""Our engine: any field, any of our methods, exact gradients under a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from neuralode.errors import UsageError
from neuralode.ode.adjoint import solve_with_adjoint
from neuralode.ode.clock import host_values
from neuralode.ode.dense import Stop
from neuralode.ode.diagnosis import diagnosis, diagnosis_of_fixed_steps, jacobian_norm, steepest_sample
from neuralode.ode.events import Event, EventWatch
from neuralode.ode.memory import MemoryBudget
from neuralode.ode.observed_field import Field, tensors
from neuralode.ode.packing import Packing, has_samples
from neuralode.ode.parameters import REMEDY, HeldField
from neuralode.ode.recompute import solve_recomputing
from neuralode.ode.rows import Loop, RowIntegration
from neuralode.ode.setup import adjoint_settings, begin
from neuralode.ode.solution import Events, SolveError, State, Stats, Status
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper import CountedField, Failure, Integration
from neuralode.ode.tolerance import all_finite, in_transform, transformed
from neuralode.ode.unchanging import generators_of


class Outcome(NamedTuple):
    """What a solve gave."""

    ys: State
    """The states [T, *shape]."""
    dense: Callable[[Any], State] | None
    events: Events | None


def run(
    field: Field, y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats,
    keep_dense: bool = False, events: Event | Sequence[Event] | None = None, strict: bool = True,
    leave_out: bool = False,
) -> Outcome:  # fmt: skip
    """Solves from ts[0] through all of ts, [T] or [B, T], or to the events.

    Raises SolveError with a diagnosis where the solve cannot go on or, if `strict`, the result is not finite.

    Args:
        leave_out: samples that fail are NaN, and the others, which have steps of their own, go on.
    """
    by_sample = ts.dim() == 2 or (config.per_sample and tensors(y0)[0].numel() > 0)
    ts = ts.to(torch.promote_types(ts.dtype, tensors(y0)[0].dtype.to_real()))
    packing = Packing(y0, rows=by_sample or (events is not None and has_samples(y0)))
    y = packing.pack(y0)
    counted = CountedField(packing.field(field), args, lambda dy, _: packing.check(dy))
    loop = begin(field, y0, y, ts, config, counted, packing, stats, by_sample, keep_dense, events is not None)
    if leave_out:
        assert isinstance(loop, RowIntegration)
        loop.go_on_without_failures()
    watch = None if events is None else EventWatch(events, args, loop, packing, keep_dense)
    try:
        if watch is None:
            ys = _integrate(loop, field, packing, config, stats)
        else:
            loop.run(pause=watch.look)
            ys = watch.fill(ts)
        if strict and not all_finite(ys[-1]):
            raise Failure(Status.NON_FINITE, host_values(ts)[-1] if ts.dim() == 1 else math.nan, ys[-1].detach(), 0.0)
    except Failure as failure:
        raise _explained(failure, loop, packing, stats) from None
    finally:
        stats.nfe = counted.nfe
    found, stop = (None, None) if watch is None else (watch.found, watch.stop())
    if isinstance(loop, RowIntegration) and leave_out:
        failed = stats.failed_per_sample = loop.failed(ys)
        if bool(failed.any()):
            lost = loop.rows.spread(failed)
            last = loop.y.masked_fill(lost, math.nan)
            ys = ys.masked_fill(lost, math.nan)
            found = None if found is None else replace(found, ys=packing.unpack(last))
            stop = Stop.of_failures(lost, loop.rows.spread(loop.direction), last, stop)
    return Outcome(
        packing.unpack(_counting_products(ys.contiguous(), loop, stats)),
        loop.dense_output(packing, stop) if loop.extras.dense else None,
        found,
    )


def _integrate(integration: Loop, field: Field, packing: Packing, config: SolverConfig, stats: Stats) -> torch.Tensor:
    """Runs to the end under the checkpoint policy; the states [T, *shape], and the sums of estimates into `stats`."""
    if config.gradient == "adjoint" and torch.is_grad_enabled():
        held = HeldField(field, integration.field.args, packing)
        inputs = _inputs(integration, held)
        assert isinstance(integration, Integration)
        return torch.stack(solve_with_adjoint(integration, held, inputs, adjoint_settings(config, integration), stats))
    policy = config.checkpoint
    needs_all = integration.settings.keep_dense or (policy == "auto" and transformed())
    if policy == "never" or needs_all or not torch.is_grad_enabled():
        integration.run()
    elif policy == "auto":
        budget = MemoryBudget(config.memory_budget, field, integration)
        evaluations = integration.planned_steps * integration.settings.method.stages
        integration.run(pause=None if budget.suffices(evaluations) else budget.exhausted)
    if not integration.done:
        held = HeldField(field, integration.field.args, packing)
        inputs = _inputs(integration, held)
        if not (inputs or integration.y.requires_grad or integration.clock.ts.requires_grad):
            # nothing that wants a gradient so far: steps leave no graph until the field comes to use such a thing
            integration.run(pause=lambda: integration.y.requires_grad)
            inputs = [] if integration.done else _inputs(integration, held)
    outputs, final = list(integration.outputs), integration.y
    error, stiffness = integration.extras.error_sum, integration.extras.stiffness_sum
    if not integration.done:
        integration.extras.error_sum = integration.extras.stiffness_sum = None
        limit = None if isinstance(policy, str) else policy
        more = solve_recomputing(integration, held, inputs, limit, stats)
        if config.estimates:
            *more, more_error, more_stiffness = more
            error = more_error if error is None else error + more_error
            if integration.extras.stiffness_sum is not None:
                stiffness = more_stiffness if stiffness is None else stiffness + more_stiffness
        *more, final = more
        outputs += more
    if config.estimates:
        stats.error_estimate, stats.stiffness_estimate = (_total(x, integration) for x in (error, stiffness))
    return integration.assemble(outputs, final)


def _total(estimate: torch.Tensor | None, integration: Loop) -> torch.Tensor | None:
    """Of the estimates of all rows, those of failed ones left out."""
    if estimate is not None and isinstance(integration, RowIntegration) and integration.failed_after is not None:
        estimate = estimate.masked_fill(integration.failed_after >= 0, 0.0)
    return None if estimate is None else estimate.sum()


def _inputs(integration: Loop, held: HeldField) -> list[torch.Tensor]:
    """What the field depends on besides t and y; the integration goes on from here without a graph."""
    y = integration.y.detach()
    torch.clear_autocast_cache()  # a weight cast before would hide the parameter behind it
    drawn = generators_of(y.device)
    inputs, slope = held.all_inputs(lambda: integration.field(integration.moment(), y))
    integration.f0 = slope
    if not all(map(torch.equal, drawn, generators_of(y.device))):
        raise UsageError(
            "the field draws random numbers (dropout?), and the backward pass, which evaluates it again, would draw "
            f"others; draw before the solve, or {REMEDY}"
        )
    return inputs


def _counting_products(ys: torch.Tensor, integration: Loop, stats: Stats) -> torch.Tensor:
    """Notes, when a gradient reaches the states, the vector-Jacobian products that the kept graphs take."""
    products = integration.in_graph
    if ys.requires_grad and products and not in_transform():

        def note(_gradient: torch.Tensor) -> None:
            stats.nfe_backward += products

        ys.register_hook(note)
    return ys


def _explained(failure: Failure, integration: Loop, packing: Packing, stats: Stats) -> SolveError:
    stats.nfe = integration.field.nfe
    steps, allowed = integration.planned_steps, integration.settings.max_steps
    if failure.status is Status.MAX_STEPS and allowed < steps < math.inf:
        stats.diagnosis = diagnosis_of_fixed_steps(stats.method, int(steps), allowed)
        return SolveError(stats.diagnosis, failure.status, stats)
    y, stiffness, steepest = failure.y.detach(), math.nan, None
    if failure.status is not Status.NON_FINITE and not in_transform():
        time = integration.moment()
        field = integration.field
        stiffness = abs(failure.h) * jacobian_norm(lambda x: field.field(time, x, *field.args), y)
        if failure.sample is None and integration.f0 is not None:
            steepest = steepest_sample(packing.unpack(y), packing.unpack(integration.f0.detach()))
    begun = failure.t if stats.accepted else None
    suspect = None if in_transform() else packing.unpack(failure.suspect.detach())
    stats.diagnosis = diagnosis(failure.status, stats, begun, suspect, stiffness, failure.sample, steepest)
    return SolveError(stats.diagnosis, failure.status, stats)
