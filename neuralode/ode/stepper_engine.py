"""Our engine: any field, any of our methods, exact gradients under a memory budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from neuralode.errors import UsageError
from neuralode.ode.adjoint import AdjointSettings, solve_with_adjoint
from neuralode.ode.clock import Clock, host_values
from neuralode.ode.diagnosis import diagnosis, jacobian_norm
from neuralode.ode.events import Event, EventWatch
from neuralode.ode.memory import MemoryBudget
from neuralode.ode.methods import METHODS
from neuralode.ode.packing import Packing, has_samples
from neuralode.ode.parameters import HeldField
from neuralode.ode.recompute import solve_recomputing
from neuralode.ode.rows import Loop, RowClock, RowIntegration, Rows, check_rows
from neuralode.ode.solution import Events, SolveError, State, Stats, Status
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper import CountedField, Failure, Integration, Settings
from neuralode.ode.tolerance import Tolerance, all_finite, largest_rms, rms

Field = Callable[..., Any]

_OPTIONS = {
    "first_step",
    "max_num_steps",
    "safety",
    "ifactor",
    "dfactor",
    "norm",
    "step_size",
    "grid_constructor",
    "steps_per_sync",
}


def unable(config: SolverConfig, by_sample: bool = False, outputs: int = 2, events: bool = False) -> str:
    """Why the stepper cannot serve this solve; empty if it can.

    Args:
        by_sample: whether each sample takes steps of its own.
        outputs: number of output times.
        events: whether the solve ends at events.
    """
    if config.method not in METHODS:
        return f"the stepper has no method {config.method!r}"
    foreign = set(config.options) - _OPTIONS - METHODS[config.method].options
    if events and config.gradient == "adjoint":
        return "the adjoint does not pass through events; use gradient='exact'"
    if events and config.checkpoint not in ("auto", "never"):
        return "a solve with events keeps its graphs; leave checkpoint at 'auto'"
    if foreign:
        return f"the stepper does not know the option {sorted(foreign)[0]!r}"
    if config.gradient == "adjoint" and "grid_constructor" in config.options:
        return "the stepper's adjoint does not take a grid_constructor"
    return _unable_by_sample(config, outputs) if by_sample else ""


def _unable_by_sample(config: SolverConfig, outputs: int) -> str:
    method = METHODS[config.method]
    if not method.by_sample:
        return f"{config.method!r} takes the same steps for all samples"
    if config.gradient == "adjoint":
        return "the adjoint takes the same steps for all samples; use gradient='exact'"
    if outputs > 2 and not method.interpolates:
        return f"{config.method!r} has no dense output accurate enough for times of each sample; use 'dop853'"
    if not method.adaptive and config.options.get("step_size", config.step_size) is None:
        return f"{config.method!r} needs a step_size to step each sample on its own"
    return ""


class Outcome(NamedTuple):
    """What a solve gave."""

    ys: State
    """The states [T, *shape]."""
    dense: Callable[[Any], State] | None
    events: Events | None


def run(
    field: Field, y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats,
    keep_dense: bool = False, events: Event | Sequence[Event] | None = None, strict: bool = True,
) -> Outcome:  # fmt: skip
    """Solves from ts[0] through all of ts, [T] or [B, T], or to the events.

    Raises SolveError with a diagnosis where the solve cannot go on or, if `strict`, the result is not finite.
    """
    by_sample = config.per_sample or ts.dim() == 2
    packing = Packing(y0, rows=by_sample or (events is not None and has_samples(y0)))
    y = packing.pack(y0)
    counted = CountedField(packing.field(field), args, lambda dy, _: packing.check(dy))
    loop = _begin(field, y0, y, ts, config, counted, packing, stats, by_sample, keep_dense or events is not None)
    watch = None if events is None else EventWatch(events, args, loop, packing)
    try:
        if watch is None:
            ys = _integrate(loop, HeldField(field, args), packing, config, stats)
        else:
            loop.run(pause=watch.look)
            ys = watch.fill(ts)
        if strict and not all_finite(ys[-1]):
            raise Failure(Status.NON_FINITE, host_values(ts)[-1] if ts.dim() == 1 else math.nan, ys[-1].detach(), 0.0)
    except Failure as failure:
        raise _explained(failure, loop, packing, stats) from None
    finally:
        stats.nfe = counted.nfe
    return Outcome(
        packing.unpack(_counting_products(ys, loop, stats)),
        loop.dense_output(packing) if keep_dense else None,
        None if watch is None else watch.found,
    )


def _begin(field: Field, y0: State, y: torch.Tensor, ts: torch.Tensor, config: SolverConfig, counted: CountedField,
           packing: Packing, stats: Stats, by_sample: bool, keep_dense: bool) -> Loop:  # fmt: skip
    """The loop that serves: on the host, or in tensors, with a row for each sample or one for all."""
    chunk = config.options.get("steps_per_sync", 8 if y.is_cuda else 1)
    if not by_sample and (chunk == 1 or in_transform() or not METHODS[config.method].adaptive or not METHODS[config.method].interpolates):
        grid = _grid(config, field, y0, ts)
        settings = _settings(config, packing, grid, keep_dense)
        clock = Clock(ts, lands=not settings.method.interpolates or grid == host_values(ts))
        return Integration(settings, counted, clock, y, stats)
    if by_sample:
        check_rows(y, ts)
        if in_transform():
            raise UsageError("steps for each sample do not work inside torch.func transforms; leave per_sample out.")
    settings = _settings(config, packing, None, keep_dense)
    row_clock = RowClock(ts, Rows(y, shared=not by_sample))
    step = None if settings.method.adaptive else config.options.get("step_size", config.step_size)
    return RowIntegration(settings, counted, row_clock, y, stats, step, chunk)


def _integrate(
    integration: Loop, held: HeldField, packing: Packing, config: SolverConfig, stats: Stats
) -> torch.Tensor:
    """Runs to the end under the checkpoint policy; the states [T, *shape], and the sums of estimates into `stats`."""
    if config.gradient == "adjoint" and torch.is_grad_enabled():
        inputs = _inputs(integration, held)
        assert isinstance(integration, Integration)
        return torch.stack(
            solve_with_adjoint(integration, packing.field(held), inputs, _adjoint(config, integration), stats)
        )
    policy = config.checkpoint
    keeps_all = not torch.is_grad_enabled() or policy == "never" or (policy == "auto" and in_transform())
    if keeps_all:
        integration.run()
    elif policy == "auto":
        budget = MemoryBudget(config.memory_budget, held.field, integration)
        integration.run(pause=budget.exhausted)
    outputs, final = list(integration.outputs), integration.y
    error, stiffness = integration.error_sum, integration.stiffness_sum
    if not integration.done:
        inputs = _inputs(integration, held)
        integration.error_sum = integration.stiffness_sum = None
        limit = None if isinstance(policy, str) else policy
        more = solve_recomputing(integration, packing.field(held), inputs, limit, stats)
        if config.estimates:
            *more, more_error, more_stiffness = more
            error = more_error if error is None else error + more_error
            stiffness = more_stiffness if stiffness is None else stiffness + more_stiffness
        *more, final = more
        outputs += more
    if config.estimates:
        stats.error_estimate, stats.stiffness_estimate = error, stiffness
    return integration.assemble(outputs, final)


def _inputs(integration: Loop, held: HeldField) -> list[torch.Tensor]:
    """What the field depends on besides t and y; the integration goes on from here without a graph."""
    y = integration.y.detach()
    inputs, slope = held.all_inputs(lambda: integration.field(integration.moment(), y))
    integration.f0 = slope
    return inputs


def _counting_products(ys: torch.Tensor, integration: Loop, stats: Stats) -> torch.Tensor:
    """Notes, when a gradient reaches the states, the vector-Jacobian products that the kept graphs take."""
    products = integration.in_graph
    if ys.requires_grad and products and not in_transform():

        def note(_gradient: torch.Tensor) -> None:
            stats.nfe_backward += products

        ys.register_hook(note)
    return ys


def _settings(config: SolverConfig, packing: Packing, grid: list[float] | None, keep_dense: bool) -> Settings:
    options = config.options
    first = options.get("first_step")
    return Settings(
        method=METHODS[config.method].fresh(options),
        tolerance=Tolerance(config.rtol, config.atol, _norm(options.get("norm"), packing)),
        controller=config.controller_object(),
        max_steps=min(config.max_steps, options.get("max_num_steps", config.max_steps)),
        max_steps_between=config.max_steps_between,
        first_step=None if first is None else float(first),
        grid=grid,
        estimates=config.estimates,
        keep_dense=keep_dense or (config.gradient == "adjoint" and config.adjoint_interpolated),
    )


def _norm(given: Callable[[Any], torch.Tensor] | None, packing: Packing) -> Callable[[torch.Tensor], torch.Tensor]:
    if given is None:
        return largest_rms(packing.sizes) if packing.tuple else rms
    return (lambda x: given(packing.unpack(x))) if packing.tuple else given


def _adjoint(config: SolverConfig, integration: Integration) -> AdjointSettings:
    forward = integration.settings
    rtol, atol = config.adjoint_rtol or config.rtol, config.adjoint_atol or config.atol
    step = config.options.get("step_size", config.step_size)

    def grid_between(start: float, end: float) -> list[float] | None:
        if forward.grid is None:
            return None
        return [start, end] if step is None else even_grid([start, end], float(step))

    settings = replace(forward, tolerance=Tolerance(rtol, atol), keep_dense=False, estimates=False)
    return AdjointSettings(settings, grid_between, config.adjoint_seminorm, config.adjoint_interpolated)


def _grid(config: SolverConfig, field: Field, y0: State, ts: torch.Tensor) -> list[float] | None:
    """The ends of the steps of a fixed-step method: every `step_size`, as the caller constructs them, or `ts`."""
    if METHODS[config.method].adaptive:
        return None
    times = host_values(ts)
    step = config.options.get("step_size", config.step_size)
    if "grid_constructor" in config.options:
        grid = host_values(config.options["grid_constructor"](field, y0, ts))
        if grid[0] != times[0] or grid[-1] != times[-1]:
            raise UsageError("the grid of grid_constructor has to begin at the first time of t and to end at the last.")
        return grid
    if step is None:
        return times
    return even_grid(times, float(step))


def even_grid(times: list[float], step: float) -> list[float]:
    """From the first to the last time in equal steps, the last of them cut to fit."""
    span = times[-1] - times[0]
    count = max(1, math.ceil(abs(span) / step - 1e-9))
    return [times[0] + math.copysign(i * step, span) for i in range(count)] + [times[-1]]


def _explained(failure: Failure, integration: Loop, packing: Packing, stats: Stats) -> SolveError:
    stats.nfe = integration.field.nfe
    y, stiffness = failure.y.detach(), math.nan
    if failure.status is not Status.NON_FINITE and not in_transform():
        time = integration.moment()
        field = integration.field
        stiffness = abs(failure.h) * jacobian_norm(lambda x: field.field(time, x, *field.args), y)
    begun = failure.t if stats.accepted else None
    suspect = None if in_transform() else packing.unpack(failure.suspect.detach())
    stats.diagnosis = diagnosis(failure.status, stats, begun, suspect, stiffness)
    return SolveError(stats.diagnosis, failure.status, stats)


def in_transform() -> bool:
    """Whether the solve runs inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None
