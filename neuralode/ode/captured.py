"""Any field on a GPU: whole steps recorded as a CUDA graph, replayed in chunks, with no look of the host in between.

A graph repeats what it recorded, whatever the field's code would do now. So it is made only of a field that changes
nothing and draws nothing when it is called, and is used only as long as all that the field could read is the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from neuralode.kernels.cuda.driver import GPU
from neuralode.kernels.cuda.solve import Machine
from neuralode.ode.clock import host_values
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.fused_engine import limits_of
from neuralode.ode.graphs import Graphs
from neuralode.ode.methods import METHODS
from neuralode.ode.observed_field import Field
from neuralode.ode.packing import Packing
from neuralode.ode.readings import reads
from neuralode.ode.setup import OPTIONS, settings_of
from neuralode.ode.solution import State, Stats
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper import Settings
from neuralode.ode.tolerance import transformed
from neuralode.ode.unchanging import NotCaptured

_MOST = 8
"""Graphs of one field, for states of different shapes."""


def run(field: Field, y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats) -> State:
    """Solves from ts[0] through all of ts; the states [T, *shape].

    Raises:
        NotCaptured: where no graph can serve; the field may have been evaluated.
    """
    if reason := unable(y0, ts, args, config):
        raise NotCaptured(reason)
    assert isinstance(y0, torch.Tensor)
    times = tuple(host_values(ts))
    graphs = _graphs_of(field, y0, settings_of(config, Packing(y0), None, keep_dense=False), times)
    if graphs.records:
        later = _Replayed.apply(graphs, times, stats, y0, *graphs.inputs)
    else:
        later, _ = graphs.solve(y0, times, stats)
    return torch.cat([y0[None], later])


def unable(y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig) -> str:
    """Why no graph can serve solves of this kind; empty if one can."""
    method = METHODS[config.method]
    if not (isinstance(method, RungeKutta) and method.adaptive and not method.tableau.error_low):
        return f"graphs have no method {config.method!r}"
    if not isinstance(y0, torch.Tensor) or y0.dtype not in (torch.float32, torch.float64) or y0.numel() == 0:
        return "graphs are for a state that is one tensor in single or double precision"
    if ts.dim() == 2 or config.per_sample:
        return "graphs are for steps that the samples share"
    if ts.shape[-1] > 2 and not reads(method):
        return f"graphs read no output times between steps of {config.method!r}"
    if ts.requires_grad or args or (config.gradient == "adjoint" and torch.is_grad_enabled()) or config.estimates:
        return "graphs have no gradient of the times, no arguments of the field, no adjoint and no estimates"
    if isinstance(config.checkpoint, int):
        return "graphs keep the start of every step"
    if set(config.options) - (OPTIONS - {"norm"}) - method.options or config.max_steps_between is not None:
        return "graphs do not know an option that was given"
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    if transformed() or hooked or torch.is_inference_mode_enabled():
        return "graphs are for plain evaluation"
    if torch.is_autocast_enabled(y0.device.type):
        return "autocast is on"
    return ""


_TRIALS, _WORTH = 3, 8
"""Recordings of a kind that are made in any case, and solves that each must have served for there to be more."""
_known: weakref.WeakKeyDictionary[Any, dict[Any, _Known]] = weakref.WeakKeyDictionary()
_recording = threading.Lock()
_FIRST = "this is the first solve of its kind"


def _graphs_of(field: Field, y0: torch.Tensor, settings: Settings, times: tuple[float, ...]) -> Graphs:
    """The field's graphs for solves of this kind, made at the second of them: a single one would not pay for it."""
    records = torch.is_grad_enabled()
    stream = torch.cuda.current_stream(y0.device) if y0.is_cuda else None
    kind = y0.shape, y0.dtype, y0.device, y0.requires_grad, records, settings.method.name, limits_of(settings)
    key = *kind, len(times) > 2, stream, torch.get_default_dtype()
    try:
        found = _known.setdefault(field, {})
    except TypeError:
        raise NotCaptured("the field cannot be remembered from one solve to the next") from None
    known = found.get(key)
    if known is None:
        if len(found) >= _MOST:
            found.clear()
        known = found[key] = _Known()
        raise NotCaptured(_FIRST)
    if known.obstacle:
        raise NotCaptured(known.obstacle)
    if known.graphs is None or not known.graphs.hold(field):
        if not _recording.acquire(blocking=False):  # by another thread, or around this very solve
            raise NotCaptured("another solve is being recorded")
        try:
            known.record(lambda: Graphs(field, y0, times, settings, machine(), records))
        finally:
            _recording.release()
    assert known.graphs is not None
    return known.graphs


class _Known:
    """What is known of solves of one kind: their graphs, or why there are none."""

    def __init__(self) -> None:
        self.graphs: Graphs | None = None
        self.obstacle = ""
        self._recorded = self._solves = 0

    def record(self, make: Callable[[], Graphs]) -> None:
        """Makes the graphs, unless they were made too often for what they were used.

        Raises:
            NotCaptured: if there are none now.
        """
        self._solves += self.graphs.solves if self.graphs else 0
        self.graphs = None
        try:
            if self._recorded >= _TRIALS and self._solves < _WORTH * self._recorded:
                raise NotCaptured("it changes from solve to solve")
            self._recorded += 1
            self.graphs = make()
        except NotCaptured as why:
            self.obstacle = str(why)
            raise


def machine() -> Machine:
    """What compiles and runs the fused operations."""
    return GPU()


class _Replayed(torch.autograd.Function):
    """The states of a solve by graphs, at the times after the first."""

    @staticmethod
    def forward(ctx: Any, graphs: Graphs, times: tuple[float, ...], stats: Stats, y0: torch.Tensor,
                *inputs: torch.Tensor) -> torch.Tensor:  # fmt: skip
        ys, ctx.kept = graphs.solve(y0, times, stats)
        ctx.graphs, ctx.times, ctx.stats = graphs, times, stats
        ctx.save_for_backward(y0, *inputs)
        return ys

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            gradient, totals = ctx.graphs.pull(ctx.kept, cotangents[0], ctx.stats)
            return (None, None, None, gradient, *totals)
        needed = ctx.needs_input_grad[3:]
        ys = ctx.graphs.again(inputs[0], ctx.times, ctx.kept)
        wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
        found = iter(torch.autograd.grad(ys, wanted, cotangents[0], create_graph=True, allow_unused=True))
        return (None, None, None, *(next(found) if n else None for n in needed))
