"""The fastest of our engines that can serve a solve: the kernels, recorded steps on a GPU, else the stepper."""

from __future__ import annotations

from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.ode import captured, fused_engine, stepper_engine
from neuralode.ode.observed_field import Field, tensors
from neuralode.ode.solution import State, Stats
from neuralode.ode.solver_config import SolverConfig

RECORDS = {"cuda"}
"""Kinds of devices whose operations can be recorded."""


def run_fastest(field: Field, y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats,
                strict: bool = True) -> State:  # fmt: skip
    """Solves from ts[0] through all of ts, [T] or [B, T]; the states [T, *shape], engine and reason into `stats`.

    Raises:
        UsageError: if the kernels were asked for and cannot serve.
        SolveError: where the solve cannot go on or, if `strict`, the result is not finite.
    """
    try:
        return fused_engine.run(field, y0, ts, args, config, stats)
    except fused_engine.NotFused as why:
        if config.engine == "fused" and not why.failed:
            raise UsageError(f"engine='fused' cannot serve this solve: {why}; give engine='auto'.") from None
        stats.reason = f"not the kernels: {why}"
        failed = why.failed
    if tensors(y0)[0].device.type in RECORDS and not failed:
        try:
            return captured.run(field, y0, ts, args, config, stats)
        except captured.NotCaptured as why:
            stats.reason += f"; not recorded: {why}"
    stats.engine = "stepper"
    return stepper_engine.run(field, y0, ts, args, config, stats, strict=strict).ys
