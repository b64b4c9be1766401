"""The fused operations of a Runge-Kutta step around a field that PyTorch evaluates; time and step are on the device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from neuralode.kernels.cuda.solve import Machine
from neuralode.kernels.cuda.source import table
from neuralode.kernels.task import Int, Limits, LimitsData, Long, MethodData, Pointer

_THREADS = 256
"""Of a block; fewer where the state is small. A power of two."""
_MOST_BLOCKS = 512


class Progress(ctypes.Structure):
    """As csrc/control.h has it."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("t", "end", "size", "last", "before")),
        *((name, ctypes.c_bool) for name in ("rejected", "done")), ("next", Int),
        *((name, Long) for name in ("accepted", "tried", "tried_at_output")),
    ]  # fmt: skip


class Control(ctypes.Structure):
    """Where a solve stands, as csrc/cuda/stages.cuh has it."""

    _fields_ = [
        ("progress", Progress), ("h", ctypes.c_double), ("direction", ctypes.c_double),
        *((name, Long) for name in ("lands", "moved", "kept", "status", "done")),
    ]  # fmt: skip


T, SIZE, H = (at // 8 for at in (Progress.t.offset, Progress.size.offset, Control.h.offset))
"""Places of the time and of the step's size without and with its sign in a control, in numbers of double precision."""
DIRECTION, KEPT = (at // 8 for at in (Control.direction.offset, Control.kept.offset))


@functools.cache
def _problem_of(stages: int) -> type[ctypes.Structure]:
    class Problem(ctypes.Structure):
        _fields_ = [
            ("count", Long), ("stage", Int), ("records", Int), ("slopes", Pointer * stages),
            *((name, Pointer) for name in (
                "y", "slope", "point", "time", "end", "kept_y", "kept_t", "kept_h", "kept_k", "parts", "tickets",
                "control")),
            ("adjoints", Pointer * stages), *((name, Pointer) for name in ("adjoint", "extra", "result")),
            ("limits", Limits),
        ]  # fmt: skip

    return Problem


@functools.lru_cache(maxsize=64)
def write_stages(method: MethodData, dtype: torch.dtype) -> str:
    """The source of the operations of a method with error control."""
    stages = len(method.c)
    square = [[*row, *[0.0] * (stages - len(row))] for row in method.a]
    return "\n".join([
        f"typedef {'double' if dtype == torch.float64 else 'float'} T;",
        '#include "device.h"',
        "namespace neuralode {",
        f"constexpr int STAGES = {stages}, ERROR_ORDER = {method.error_order};",
        f"constexpr int EVALUATED = {stages - method.fsal};",
        f"constexpr bool FSAL = {str(method.fsal).lower()};",
        table("double", "A", square), table("double", "B", method.b), table("double", "C", method.c),
        table("double", "ERROR", method.error),
        "}",
        '#include "stages.cuh"',
        "",
    ])  # fmt: skip


class Stages:
    """The operations on one solve's state, and the memory that they share with it.

    Args:
        like: the state, of any shape, contiguous.
        chunk: steps whose starts are kept until the host fetches them; 0 for operations of the reverse.
        records: whether they are kept at all.
        reads: whether output times are read between the steps, from their slopes.
    """

    def __init__(self, machine: Machine, method: MethodData, limits: LimitsData, like: torch.Tensor, chunk: int,
                 records: bool, reads: bool):  # fmt: skip
        self.machine, self.method, self.device = machine, method, like.device
        self.stages = len(method.c)
        self.evaluated = self.stages - method.fsal
        self.source = write_stages(method, like.dtype)
        self.y, self.slope, self.end, self.adjoint = (torch.zeros_like(like) for _ in range(4))
        self.points = [torch.zeros_like(like) for _ in range(self.stages)]
        self.times = [like.new_zeros(()) for _ in range(self.stages)]
        self.results = [] if chunk else [torch.zeros_like(like) for _ in range(self.stages)]
        double = {"dtype": torch.double, "device": like.device}
        self.control = torch.zeros(ctypes.sizeof(Control) // 8, **double)  # type: ignore[call-overload]
        records = records or reads
        self.kept_y = like.new_zeros(chunk if records else 0, *like.shape)
        self.kept_t, self.kept_h = torch.zeros(chunk, **double), torch.zeros(chunk, **double)  # type: ignore[call-overload]
        self.kept_k = like.new_zeros(chunk if reads else 0, self.stages, *like.shape)
        """The slopes of the steps that are kept."""
        self.extra = like.new_zeros(0 if chunk or not reads else self.evaluated, *like.shape)
        """What output times add to the adjoints of a step's slopes."""
        self._threads = min(_THREADS, max(32, 1 << (like.numel() - 1).bit_length()))
        wanted = min(_MOST_BLOCKS, -(-like.numel() // self._threads))
        self._parts = torch.zeros(wanted, **double)  # type: ignore[call-overload]
        self._tickets = torch.zeros(1, dtype=torch.int32, device=like.device)
        self._wanted, self._limits = wanted, Limits(*vars(limits).values())
        self._fixed: dict[str, Any] = {
            "count": like.numel(), "records": records, "limits": self._limits,
            **{name: x.data_ptr() or None for name, x in {
                "y": self.y, "slope": self.slope, "end": self.end, "kept_y": self.kept_y, "kept_t": self.kept_t,
                "kept_h": self.kept_h, "kept_k": self.kept_k, "extra": self.extra, "parts": self._parts,
                "tickets": self._tickets, "control": self.control, "adjoint": self.adjoint}.items()},
        }  # fmt: skip

    def begin(self, control: Control) -> None:
        """Sets where the solve stands."""
        self.control.copy_(torch.frombuffer(bytearray(control), dtype=torch.double))

    def read(self) -> Control:
        """Where the solve stands; waits for the device."""
        return Control.from_buffer_copy(self.control.cpu().numpy().tobytes())

    def first(self) -> None:
        """Chooses the first step, by the size in the control."""
        self._launch("rk_begin")

    def stage(self, i: int, slopes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Time and state at stage i, from the slopes of the stages before it."""
        point, time = self.points[i], self.times[i]
        self._launch("rk_stage", slopes, stage=i, point=point.data_ptr(), time=time.data_ptr())
        return time, point

    def finish(self, slopes: Sequence[torch.Tensor]) -> None:
        """The end of the step, its error, the decision, and the next step."""
        self._launch("rk_finish", slopes, shared=self._threads * 8)

    def move(self, slopes: Sequence[torch.Tensor]) -> None:
        """Goes to the end of the step if it stood."""
        self._launch("rk_move", slopes)

    def stage_bwd(self, i: int, adjoints: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """The adjoint of the slope of stage i, from those of the end and of the states at the stages after it."""
        self._launch("rk_stage_bwd", adjoints=adjoints, stage=i, result=self.results[i].data_ptr())
        return self.results[i]

    def start_bwd(self, adjoints: Sequence[torch.Tensor | None]) -> None:
        """From the adjoint of the end of a step to that of its start."""
        self._launch("rk_start_bwd", adjoints=adjoints, result=self.adjoint.data_ptr())

    def _launch(self, name: str, slopes: Sequence[torch.Tensor] = (), adjoints: Sequence[torch.Tensor | None] = (),
                shared: int = 0, **given: Any) -> None:  # fmt: skip
        arrays = {"slopes": self._pointers(slopes), "adjoints": self._pointers(adjoints)}
        problem = _problem_of(self.stages)(**self._fixed, **given, **arrays)
        kernel = self.machine.kernel(self.source, name, self._threads, self.device)
        kernel.launch(self._wanted, shared, problem, together=False)

    def _pointers(self, tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
        return (Pointer * self.stages)(*(None if x is None else x.data_ptr() for x in tensors))
