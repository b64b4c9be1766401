"""Whole solves by the compiled kernels of the CPU: the memory that they share with PyTorch, and their calls."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from neuralode.kernels.library import Library, Runtime, runtime
from neuralode.kernels.plan import make_plan
from neuralode.kernels.program import Program
from neuralode.kernels.task import BETWEEN, Int, Job, Limits, Long, MethodData, Pointer, Report, Task

_PATIENCE = 0.2
"""Seconds between two looks at whether to stop (Ctrl-C)."""
_passes = itertools.count(1)


class _Method(ctypes.Structure):
    _fields_ = [
        *((name, Int) for name in (
            "stages", "first_same_as_last", "order", "error_order", "adaptive", "lands", "between", "degree")),
        *((name, Pointer) for name in ("c", "a", "b", "error", "error_low", "interpolant")),
    ]  # fmt: skip


class _Problem(ctypes.Structure):
    _fields_ = [
        ("rows", Long),
        *((name, Int) for name in (
            "width", "slot", "output", "time", "operation_count", "cleared_count", "tensor_count", "groups")),
        *((name, Pointer) for name in (
            "operations", "constants", "cleared", "group", "tensors", "tensor_shapes", "tensor_gradients")),
        ("method", _Method), ("limits", Limits),
        *((name, Int) for name in (
            "per_sample", "times", "times_per_sample", "records", "times_move", "threads")),
        ("ts", Pointer), ("grid", Pointer), ("grid_count", Long), ("budget", Long),
        ("runtime", Runtime),
        *((name, Pointer) for name in ("y0", "slope", "ys")),
    ]  # fmt: skip


@functools.lru_cache(maxsize=64)
def _method(data: MethodData) -> tuple[_Method, list[Any]]:
    """The method as the kernels read it, and the arrays that have to live as long."""
    stages = len(data.c)
    square = [[*row, *[0.0] * (stages - len(row))] for row in data.a]
    low = _doubles(data.error_low) if data.error_low else None
    rows = [x for row in data.interpolant for x in row]
    arrays = [_doubles(data.c), _doubles([x for row in square for x in row]), _doubles(data.b),
              _doubles(data.error or [0.0] * stages), low, _doubles(rows or [0.0])]  # fmt: skip
    pointers = [None if array is None else ctypes.addressof(array) for array in arrays]
    method = _Method(
        stages, data.fsal, data.order, data.error_order, bool(data.error), data.lands, BETWEEN.index(data.between),
        len(data.interpolant[0]) if data.interpolant else 0, *pointers,
    )  # fmt: skip
    return method, arrays


class _Outline:
    """A problem of which only the numbers are missing, and the arrays that it points to.

    Args:
        shape: of the state, [B, D].
        times: shape of the output times.
    """

    def __init__(self, job: Job, shape: torch.Size, times: torch.Size):
        count = len(job.program.shapes)
        self.shapes = [torch.Size(shape[0] if n == -1 else n for n in own) for own in job.program.shapes]
        """Of the program's tensors."""
        plan = make_plan(job.program, job.wants_gradient or (False,) * count, job.times_move)
        shapes = _ints([n for i in range(count) for n in _shape(job.program, i)])
        gradients, groups = _ints(job.wants_gradient or (0,) * count), _ints(job.groups)
        method, arrays = _method(job.method)
        self._alive = plan, shapes, gradients, groups, arrays
        address = ctypes.addressof
        self.problem = _Problem(
            rows=shape[0], width=shape[1], slot=plan.slot, output=plan.output, time=plan.time,
            operation_count=len(plan.lines), cleared_count=len(plan.cleared) // 2, tensor_count=count,
            groups=max(job.groups) + 1, operations=address(plan.lines), constants=address(plan.constants),
            cleared=address(plan.cleared), group=address(groups), tensor_shapes=address(shapes),
            tensor_gradients=address(gradients), method=method, limits=Limits(*vars(job.limits).values()),
            per_sample=job.per_sample, times=times[-1], times_per_sample=len(times) == 2, records=job.records,
            times_move=job.times_move, budget=job.budget, runtime=runtime(),
        )  # fmt: skip


_outline = functools.lru_cache(maxsize=256)(_Outline)


@functools.lru_cache(maxsize=64)
def _grid(ends: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    return _doubles(ends)


def _doubles(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _ints(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * max(1, len(values)))(*values)


class CPUSolve(ctypes.Structure):
    """One solve under way, or done and kept for its backward passes. What the kernels hold is freed with it.

    It is a Structure so that a tensor may own it: a graph that lets its saved tensors go lets this go too.
    """

    _fields_ = [("unused", ctypes.c_char)]

    def __init__(self, library: Library, task: Task):
        super().__init__()
        self.handle: int | None = None
        self._one_at_a_time = threading.Lock()  # backward passes share the threads' memory
        self.functions = library.functions
        self.task, job = task, task.job
        self.ys = task.y0.new_empty(task.ts.shape[-1], *task.y0.shape)
        self.tensors = [x.contiguous() for x in task.tensors]
        outline = self._outline = _outline(job, task.y0.shape, task.ts.shape)
        pointers = _pointers(self.tensors)
        problem = _Problem.from_buffer_copy(outline.problem)
        problem.tensors, problem.threads = ctypes.addressof(pointers), torch.get_num_threads()
        problem.y0, problem.ts, problem.ys = task.y0.data_ptr(), task.ts.data_ptr(), self.ys.data_ptr()
        if task.grid is not None:
            grid = _grid(task.grid)
            problem.grid, problem.grid_count = ctypes.addressof(grid), len(grid)
        if task.slope is not None:
            problem.slope = task.slope.data_ptr()
        self._alive = pointers, None if task.grid is None else grid
        handle = self.functions.neuralode_begin(ctypes.addressof(problem), task.y0.dtype == torch.float64)
        if not handle:
            raise MemoryError("the kernels could not get the memory that a solve needs.")
        self.handle = handle
        self.report = Report()

    def forward(self) -> Report:
        """Solves; the states are in `ys`, [T, B, D]."""
        forward, report = self.functions.neuralode_forward, ctypes.addressof(self.report)
        self._run(lambda: forward(self.handle, _PATIENCE, report))
        return self.report

    def backward(self, grad_ys: torch.Tensor, wants_y0: bool) -> tuple[torch.Tensor | None, list[torch.Tensor | None],
                                                                      torch.Tensor | None]:  # fmt: skip
        """The gradients of the state [B, D], of the tensors, and of the times in double precision."""
        like, job = self.task.y0, self.task.job
        y0 = torch.empty_like(like) if wants_y0 else None
        wants = job.wants_gradient or itertools.repeat(False)
        found = [_room(like, shape) if w else None for shape, w in zip(self._outline.shapes, wants, strict=False)]
        times = torch.empty_like(self.task.ts) if job.times_move else None
        grad_ys = grad_ys.contiguous()
        room = _pointers(found)
        backward, products = self.functions.neuralode_backward, ctypes.addressof(self.report) + Report.products.offset
        given = grad_ys.data_ptr(), _data(y0), ctypes.addressof(room), _data(times), _PATIENCE, next(_passes)
        threads = torch.get_num_threads()
        with self._one_at_a_time:
            self._run(lambda: backward(self.handle, *given, threads, products))
        return y0, found, times

    def take_states(self) -> torch.Tensor:
        """The states [T, B, D], handed over: a graph that owns this solve must not be owned by it through them."""
        ys = self.ys
        del self.ys
        return ys

    def sizes(self) -> list[float]:
        """Sizes of the accepted steps that the samples share."""
        steps, first = self.report.steps, self.report.sizes
        if steps <= len(first):
            return first[:steps]
        found = (ctypes.c_double * steps)()
        self.functions.neuralode_read(self.handle, ctypes.addressof(found), None, None)
        return list(found)

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Accepted and tried steps of each sample, [B]."""
        accepted, tried = (torch.zeros(len(self.task.y0), dtype=torch.long) for _ in range(2))
        self.functions.neuralode_read(self.handle, None, accepted.data_ptr(), tried.data_ptr())
        return accepted, tried

    def _run(self, go_on: Callable[[], int]) -> None:
        while (state := go_on()) == 1:  # between two calls Python sees to its signals
            pass
        if state < 0:
            raise MemoryError("the kernels could not get the memory that a solve needs.")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.functions.neuralode_end(self.handle)
            self.handle = None


def _room(like: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return like.new_empty(*shape) if shape else like.new_empty(())  # separate numbers are read in half the time


def _pointers(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (Pointer * max(1, len(tensors)))(*[None if x is None else x.data_ptr() for x in tensors])


def _data(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _shape(program: Program, index: int) -> tuple[int, int]:
    """(outputs, inputs) of a tensor: inputs are 0 for one that is no weight, -1 for one that has a row a sample."""
    shape = program.shapes[index]
    if shape and shape[0] == -1:
        return int(torch.Size(shape[1:]).numel()), -1
    is_weight = any(op.kind == "linear" and op.tensors[0] == index for op in program.operations)
    if is_weight:
        return shape[0], shape[1]
    return int(torch.Size(shape).numel()), 0
