"""What a configuration asks of the stepper: whether it can serve, the loop, the settings, the grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode.adjoint import AdjointSettings
from neuralode.ode.clock import Clock, RowClock, Rows, check_rows, host_values
from neuralode.ode.methods import METHODS, OPTIONS_OF_ADAPTIVE_STEPS, OPTIONS_OF_FIXED_STEPS
from neuralode.ode.observed_field import Field
from neuralode.ode.packing import Packing
from neuralode.ode.rows import Loop, RowIntegration
from neuralode.ode.solution import State, Stats
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper import CountedField, Integration, Settings
from neuralode.ode.tolerance import Tolerance, in_transform, largest_rms, rms

OPTIONS = OPTIONS_OF_FIXED_STEPS | OPTIONS_OF_ADAPTIVE_STEPS


def unable(config: SolverConfig, by_sample: bool = False, outputs: int = 2, events: bool = False,
           dense: bool = False) -> str:  # fmt: skip
    """Why the stepper cannot serve this solve; empty if it can.

    Args:
        by_sample: whether each sample takes steps of its own.
        outputs: number of output times.
        events: whether the solve ends at events.
        dense: whether the caller wants dense output.
    """
    if config.method not in METHODS:
        return f"the stepper has no method {config.method!r}"
    foreign = set(config.options) - OPTIONS - METHODS[config.method].options
    if events and config.gradient == "adjoint":
        return "the adjoint does not pass through events; use gradient='exact'"
    if events and config.checkpoint not in ("auto", "never"):
        return "a solve with events keeps its graphs; leave checkpoint at 'auto'"
    if events and config.estimates:
        return "a solve with events sums up no estimates"
    if config.estimates and not METHODS[config.method].adaptive:
        return f"{config.method!r} makes no estimate of its error"
    if config.estimates and config.gradient == "adjoint":
        return "the adjoint does not pass through the estimates; use gradient='exact'"
    if dense and (config.gradient == "adjoint" or config.checkpoint not in ("auto", "never")):
        return "dense output keeps the graphs of its steps; use gradient='exact' and leave checkpoint at 'auto'"
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


def begin(field: Field, y0: State, y: torch.Tensor, ts: torch.Tensor, config: SolverConfig, counted: CountedField,
          packing: Packing, stats: Stats, by_sample: bool, keep_dense: bool, events: bool) -> Loop:  # fmt: skip
    """The loop that serves: on the host, or in tensors, with a row for each sample or one for all."""
    if by_sample:
        check_rows(y, ts)
        if in_transform():
            raise UsageError("steps for each sample do not work inside torch.func transforms; leave per_sample out.")
    # no sample may go on beyond its event, where its field may end, so that the host looks at each step
    chunk = 1 if events else config.options.get("steps_per_sync", 8 if y.is_cuda else 1)
    if by_sample or (chunk > 1 and _fits_one_row(config, packing)):
        settings = settings_of(config, packing, None, keep_dense or events)
        clock = RowClock(ts, Rows(y, shared=not by_sample))
        step = None if settings.method.adaptive else config.options.get("step_size", config.step_size)
        return RowIntegration(settings, counted, clock, y, stats, step, chunk)
    grid = fixed_grid(config, field, y0, ts)
    settings = settings_of(config, packing, grid, keep_dense or events)
    lands = not settings.method.interpolates or grid == tuple(host_values(ts))
    return Integration(settings, counted, Clock(ts, lands), y, stats)


def _fits_one_row(config: SolverConfig, packing: Packing) -> bool:
    """Whether the loop in tensors can serve a batch that shares its steps."""
    method = METHODS[config.method]
    plain = not packing.tuple and "norm" not in config.options and config.max_steps_between is None
    return (
        plain
        and method.by_sample
        and method.adaptive
        and method.interpolates
        and (config.gradient == "exact" and not in_transform())
    )


def settings_of(config: SolverConfig, packing: Packing, grid: tuple[float, ...] | None, keep_dense: bool) -> Settings:
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


def adjoint_settings(config: SolverConfig, integration: Integration) -> AdjointSettings:
    forward = integration.settings
    rtol, atol = config.adjoint_rtol or config.rtol, config.adjoint_atol or config.atol
    step = config.options.get("step_size", config.step_size)

    def grid_between(start: float, end: float) -> tuple[float, ...] | None:
        if forward.grid is None:
            return None
        return (start, end) if step is None else even_grid((start, end), float(step))

    settings = replace(forward, tolerance=Tolerance(rtol, atol), keep_dense=False, estimates=False)
    return AdjointSettings(settings, grid_between, config.adjoint_seminorm, config.adjoint_interpolated)


def fixed_grid(config: SolverConfig, field: Field, y0: State, ts: torch.Tensor) -> tuple[float, ...] | None:
    """The ends of the steps of a fixed-step method: every `step_size`, as the caller constructs them, or `ts`."""
    if METHODS[config.method].adaptive:
        return None
    times = tuple(host_values(ts))
    step = config.options.get("step_size", config.step_size)
    if "grid_constructor" in config.options:
        grid = tuple(host_values(config.options["grid_constructor"](field, y0, ts)))
        if grid[0] != times[0] or grid[-1] != times[-1]:
            raise UsageError("the grid of grid_constructor has to begin at the first time of t and to end at the last.")
        return grid
    if step is None:
        return times
    return even_grid(times, float(step), torch.finfo(ts.dtype).eps)


@functools.lru_cache(maxsize=64)
def even_grid(times: tuple[float, ...], step: float, precision: float = 0.0) -> tuple[float, ...]:
    """From the first to the last time in equal steps, the last of them cut to fit.

    Args:
        precision: relative, of the times: what it leaves open is no reason for a further step.
    """
    span, reach = times[-1] - times[0], max(abs(times[0]), abs(times[-1]))
    count = max(1, math.ceil(abs(span) / step - max(1e-9, min(0.1, 2 * precision * reach / step))))
    return (*(times[0] + math.copysign(i * step, span) for i in range(count)), times[-1])
