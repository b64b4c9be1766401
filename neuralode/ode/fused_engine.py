"""Whole solves in one compiled call, for fields that the kernels know as a program."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from neuralode.errors import UsageError
from neuralode.kernels.cpu import CPUSolve
from neuralode.kernels.cuda.compiler import CompileError
from neuralode.kernels.cuda.driver import GPU
from neuralode.kernels.cuda.solve import CUDASolve
from neuralode.kernels.library import library, why_not
from neuralode.kernels.lower import Lowered, NotLowered, lower, recalled
from neuralode.kernels.program import Program
from neuralode.kernels.recall import circumstances, forget, look, modes
from neuralode.kernels.task import MISMATCH, SUCCESS, Job, LimitsData, MethodData, Task
from neuralode.ode.clock import Clock, check_rows, host_values
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.methods import METHODS
from neuralode.ode.observed_field import Field, tensors
from neuralode.ode.packing import Packing
from neuralode.ode.setup import OPTIONS, fixed_grid, settings_of
from neuralode.ode.solution import State, Stats
from neuralode.ode.solver_config import SolverConfig
from neuralode.ode.stepper import CountedField, Integration, Settings
from neuralode.ode.tolerance import is_batch, watched

_WIDEST = 1024
"""Features of a state up to which a tile of it stays in the caches."""
_MOST_PARTS = 16
"""Of a tuple state, as csrc/problem.h has it."""
_NO_LIMIT = 2**62
_MOST = 256
"""Kinds of solves, and jobs of a kind, that are remembered."""
_INFERENCE = "tensors made in inference mode cannot be kept for a gradient"


class NotFused(Exception):
    """The kernels cannot serve a solve; the message says why."""

    def __init__(self, reason: str, failed: bool = False):
        super().__init__(reason)
        self.failed = failed
        """Whether they tried, and the solve failed."""


def unable(config: SolverConfig, by_sample: bool = False, outputs: int = 2) -> str:
    """Why the kernels cannot serve solves of this kind, whatever the field; empty if they can."""
    method = METHODS.get(config.method)
    if not isinstance(method, RungeKutta):
        return f"{config.method!r} is no explicit Runge-Kutta method"
    if config.gradient == "adjoint" and torch.is_grad_enabled():
        return "the continuous adjoint is the stepper's"
    if config.estimates:
        return "the stepper sums up the estimates"
    if foreign := set(config.options) - (OPTIONS - {"norm"}) - method.options:
        return f"the kernels do not know the option {sorted(foreign)[0]!r}"
    if isinstance(config.checkpoint, int):
        return "a number of states to keep is for the stepper"
    if by_sample and not method.adaptive:
        return "fixed steps of each sample are the stepper's"
    if by_sample and outputs > 2 and not method.interpolates:
        return f"{config.method!r} needs further stages between its steps"
    return ""


def run(field: Field, y0: State, ts: torch.Tensor, args: tuple[Any, ...], config: SolverConfig, stats: Stats) -> State:
    """Solves from ts[0] through all of ts, [T] or [B, T]; the states [T, *shape].

    Raises:
        NotFused: where the kernels cannot serve; nothing has been done then but evaluations of the field.
    """
    if watched():
        raise NotFused("inside a transform, or where operations are recorded, the stepper serves")
    kind = _kind_of(config, y0, ts)
    if kind.obstacle:
        raise NotFused(kind.obstacle)
    try:
        known = None if args else recalled(field, kind.when)
        lowered = known or lower(field, _begin(y0, ts, kind.by_sample), y0, args)
    except NotLowered as why:
        raise NotFused(str(why)) from None
    solve = _Solve(kind, lowered, y0, ts, fixed_grid(config, field, y0, ts) if kind.fixed else None)
    ys = solve.states()
    report = solve.kernel.report
    if report.status == MISMATCH:
        forget(field)
        raise NotFused("what was read of the field is not what it computes")
    if report.status != SUCCESS:
        raise NotFused("the solve failed, and the stepper says why", failed=True)
    lowered.count(report.evaluations - (lowered.dy is not None))
    solve.fill(stats)
    if isinstance(y0, tuple):
        return tuple(part.contiguous() for part in kind.packing.unpack(ys))
    return ys if y0.dim() == 2 else ys.reshape(len(ys), *y0.shape)


def _begin(y0: State, ts: torch.Tensor, by_sample: bool) -> torch.Tensor:
    """The first time in the state's precision: [], or [B, 1] where each sample has its own."""
    like = tensors(y0)[0]
    t = ts.detach()[..., 0].to(like.dtype)
    return t.expand(len(like)).reshape(-1, 1) if by_sample else t


class _Kind:
    """Solves of one kind: the same settings, shapes and types, whatever the field and the numbers."""

    def __init__(self, config: SolverConfig, y0: State, ts: torch.Tensor):
        self.by_sample = config.per_sample or ts.dim() == 2
        self.obstacle = unable(config, self.by_sample, ts.shape[-1]) or _unfit(y0, ts, self.by_sample)
        if self.obstacle:
            return
        if self.by_sample:
            check_rows(tensors(y0)[0], ts)
        self.when = circumstances(_begin(y0, ts, self.by_sample), y0)
        self.packing = Packing(y0, rows=isinstance(y0, tuple))
        self.settings = settings_of(config, self.packing, None, keep_dense=False)
        method = self.settings.method
        assert isinstance(method, RungeKutta)
        self.method, self.fixed = method, not method.adaptive
        self.outputs = ts.shape[-1]
        self.limits = limits_of(self.settings)
        self.budget = 0 if config.checkpoint == "always" else config.memory_budget
        self._jobs: dict[Any, Job] = {}

    def job(self, program: Program, lands: bool, moving: tuple[bool, ...]) -> Job:
        """What the kernels need to know besides the numbers; the same object for the same arguments.

        Args:
            lands: whether a step ends at every output time.
            moving: which of the state, the times and the program's tensors want a gradient; empty if none does.
        """
        found = self._jobs.get((program, lands, moving))
        if found is None:
            method = method_data(self.method.tableau, self.method.linear, lands)
            found = Job(
                program, method, self.limits, self._groups(program.width), self.by_sample, bool(moving), moving[2:],
                bool(moving) and moving[1], self.budget,
            )  # fmt: skip
            _keep(self._jobs, (program, lands, moving), found)
        return found

    def _groups(self, width: int) -> tuple[int, ...]:
        """The part of a tuple state that each feature belongs to."""
        if self.by_sample or not self.packing.tuple:
            return (0,) * width
        return tuple(i for i, size in enumerate(self.packing.sizes) for _ in range(size))


_settings = operator.attrgetter(
    "method", "rtol", "atol", "gradient", "controller", "checkpoint", "memory_budget", "per_sample", "estimates",
    "max_steps", "max_steps_between",
)  # fmt: skip
_requires_grad = operator.attrgetter("requires_grad")

_kinds: dict[Any, _Kind] = {}


def _kind_of(config: SolverConfig, y0: State, ts: torch.Tensor) -> _Kind:
    key = _settings(config), *config.options.items(), look(y0), ts.shape, ts.requires_grad, modes()
    try:
        found = _kinds.get(key)
    except TypeError:  # an option that is no key
        return _Kind(config, y0, ts)
    if found is None:
        found = _Kind(config, y0, ts)
        _keep(_kinds, key, found)
    return found


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= _MOST:
        known.clear()
    known[key] = value


def _unfit(y0: State, ts: torch.Tensor, by_sample: bool) -> str:
    parts = tensors(y0)
    if not all(part.dtype in (torch.float32, torch.float64) and part.device == parts[0].device for part in parts):
        return "the kernels are for single and double precision, on one device"
    if parts[0].device.type not in ("cpu", "cuda"):
        return f"there are no kernels for {parts[0].device.type!r}"
    if parts[0].device.type == "cpu" and library() is None:
        return why_not()
    if any(part.numel() == 0 for part in parts):
        return "the state is empty"
    if len(parts) > _MOST_PARTS:
        return f"the state has more than {_MOST_PARTS} parts"
    if torch.is_grad_enabled() and any(part.is_inference() for part in parts):
        return _INFERENCE
    if by_sample and (isinstance(y0, tuple) or y0.dim() != 2):
        return "steps of each sample are for states [B, D]"
    return ""


class _Solve:
    """One solve: the kernels' task, and the statistics."""

    def __init__(self, kind: _Kind, lowered: Lowered, y0: State, ts: torch.Tensor, grid: tuple[float, ...] | None):
        width = lowered.program.width
        if width > _WIDEST:
            raise NotFused(f"the state has {width} features a row, more than {_WIDEST}")
        self.kind, self.lowered, self.ts = kind, lowered, ts
        rows = self._as_rows(y0, width)
        method = kind.method
        lands = not kind.by_sample and (not method.interpolates or (kind.fixed and grid == tuple(host_values(ts))))
        if grid is not None and len(grid) - 1 > kind.settings.max_steps:
            raise NotFused("it takes more steps than max_steps", failed=True)
        if method.tableau.dense_c and kind.outputs > 2 and not lands:
            raise NotFused(f"{method.tableau.name!r} needs further stages between its steps")
        # the caller may go on with the times in place, where they want no gradient: only their values are needed
        doubles = ts.detach().clone() if ts.dtype == torch.float64 else ts.detach().double()
        self.inputs = [rows, ts if ts.requires_grad else doubles, *lowered.tensors]
        moving = tuple(map(_requires_grad, self.inputs))
        self.records = torch.is_grad_enabled() and any(moving)
        if self.records and any(map(torch.Tensor.is_inference, self.inputs)):
            raise NotFused(_INFERENCE)
        self.task = Task(
            kind.job(lowered.program, lands, moving if self.records else ()), lowered.tensors,
            rows.detach().contiguous(), doubles.contiguous(), grid,
            None if lowered.dy is None else self._as_rows(lowered.dy, width).detach().contiguous(),
        )  # fmt: skip

    def _as_rows(self, state: Any, width: int) -> torch.Tensor:
        packed = self.kind.packing.pack(tuple(state) if isinstance(state, list) else state)
        return packed if packed.dim() == 2 else packed.reshape(-1, width)

    def states(self) -> torch.Tensor:
        """Solves: the states [T, B, D]."""
        self.kernel = _kernel_for(self.task)
        try:
            self.kernel.forward()
        except CompileError as why:
            raise NotFused(str(why)) from None
        if not self.records or self.kernel.report.status != SUCCESS:
            return self.kernel.take_states()
        # the graph owns the kernels' memory as it owns a saved tensor: what frees that frees this
        owner = torch.frombuffer(self.kernel, dtype=torch.uint8)
        self.kernel_ref = weakref.ref(self.kernel)
        if torch._C._autograd._top_saved_tensors_default_hooks(True):
            self.hooked = self.kernel  # hooks may put something else in the place of the owner
        # not `_Fused.apply`, which looks for transforms first, at a third of its time; there are none here
        return super(torch.autograd.Function, _Fused).apply(self, owner, *self.inputs)

    def fill(self, stats: Stats) -> None:
        """Notes what the solve cost."""
        report = self.kernel.report
        stats.engine, stats.reason = "fused", stats.reason or "the kernels know the field as a program"
        stats.nfe, stats.accepted, stats.rejected = report.evaluations, report.accepted, report.rejected
        if self.task.grid is not None:
            stats.step_sizes = list(_sizes(self.task.grid))
        elif self.kind.by_sample:
            accepted, tried = self.kernel.counts()
            stats.accepted_per_sample, stats.rejected_per_sample = accepted, tried - accepted
        else:
            stats.step_sizes = self.kernel.sizes()
        stats.kept_bytes = report.kept_bytes
        self.stats = stats
        if self.records:
            del self.kernel

    def again(
        self, rows: torch.Tensor, ts: torch.Tensor, given: Sequence[torch.Tensor], sizes: list[float]
    ) -> torch.Tensor:
        """The same states by operations that autograd knows: the steps that the solve took, in plain PyTorch."""
        if self.kind.by_sample:
            raise UsageError("second derivatives through steps of each sample's own need engine='stepper'.")
        program = self.lowered.program
        counted = CountedField(lambda t, y: program(t, y, given), (), lambda dy, y: None)
        grid = self.task.grid or _ends(host_values(ts), sizes)
        settings = dataclasses.replace(self.kind.settings, grid=grid)
        clock = Clock(ts, self.task.job.method.lands)
        integration = Integration(settings, counted, clock, rows, Stats("fused", "", ""))
        integration.run()
        return torch.stack(integration.outputs)


def _kernel_for(task: Task) -> CPUSolve | CUDASolve:
    if task.y0.is_cuda:
        return CUDASolve(GPU(), task)
    loaded = library()
    assert loaded is not None
    return CPUSolve(loaded, task)


class _Fused(torch.autograd.Function):
    """The states of a solve that the kernels have done, with its exact gradient."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, owner: torch.Tensor, rows: torch.Tensor, ts: torch.Tensor,
                *given: torch.Tensor) -> torch.Tensor:  # fmt: skip
        ctx.solve = solve
        ctx.save_for_backward(owner, rows, ts, *given)
        return solve.kernel.take_states()

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        _owner, *inputs = ctx.saved_tensors
        solve: _Solve = ctx.solve
        kernel = solve.kernel_ref()
        assert kernel is not None
        if torch.is_grad_enabled() or is_batch(cotangents[0]):
            return (None, None, *_differentiable(solve, kernel, inputs, cotangents[0], ctx.needs_input_grad[2:]))
        grad_rows, grad_given, grad_ts = kernel.backward(cotangents[0], ctx.needs_input_grad[2])
        solve.stats.nfe_backward += kernel.report.products
        return (None, None, grad_rows, None if grad_ts is None else grad_ts.to(inputs[1].dtype), *grad_given)


def _differentiable(solve: _Solve, kernel: CPUSolve | CUDASolve, inputs: list[torch.Tensor], cotangent: torch.Tensor,
                    needed: Sequence[bool]) -> list[torch.Tensor | None]:  # fmt: skip
    """The gradients by operations that autograd knows, for a graph of their own or for several cotangents at once."""
    rows, ts, *given = inputs
    sizes = kernel.sizes() if solve.task.grid is None and not solve.kind.by_sample else []
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        ys = solve.again(rows, ts, given, sizes)
    wanted = [x for x, n in zip(inputs, needed, strict=True) if n]
    found = iter(torch.autograd.grad(ys, wanted, cotangent, create_graph=create_graph, allow_unused=True))
    return [next(found) if n else None for n in needed]


@functools.lru_cache(maxsize=64)
def _sizes(grid: tuple[float, ...]) -> list[float]:
    return [abs(b - a) for a, b in itertools.pairwise(grid)]


def _ends(times: list[float], sizes: list[float]) -> tuple[float, ...]:
    """The ends of the steps, as the kernels came to them."""
    direction = 1.0 if times[-1] > times[0] else -1.0
    ends = [times[0]]
    for size in sizes:
        end = ends[-1] + direction * size
        near = [t for t in times if abs(t - end) <= 1e-12 * max(abs(end), size)]
        ends.append(near[0] if near else end)
    return tuple(ends)


@functools.lru_cache(maxsize=64)
def method_data(tableau: Any, linear: bool = False, lands: bool = False) -> MethodData:
    """The method of a tableau, as the kernels read it."""
    between = "line" if linear else "polynomial" if tableau.interpolant else "hermite"
    return MethodData(
        tableau.c, tableau.a, tableau.b, tableau.error, tableau.error_low, tableau.interpolant, tableau.order,
        tableau.error_order, tableau.fsal, lands, between,
    )  # fmt: skip


def limits_of(settings: Settings) -> LimitsData:
    control = settings.controller
    return LimitsData(
        settings.tolerance.rtol, settings.tolerance.atol, control.integral, control.proportional, control.derivative,
        control.safety, control.min_factor, control.max_factor, abs(settings.first_step or 0.0), settings.max_steps,
        settings.max_steps_between or _NO_LIMIT,
    )  # fmt: skip
