"""What a solve by the kernels is given and what it reports, whichever processor it runs on."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from neuralode.kernels.program import Program

SUCCESS, NON_FINITE, STEP_UNDERFLOW, MAX_STEPS, MISMATCH, FULL = range(6)
"""How a solve ended, as csrc/kinds.h has it; FULL where there was no room to record a step."""

BETWEEN = ("hermite", "line", "polynomial")
"""How output times within a step are read, as csrc/kinds.h has it."""

Int, Long, Double, Pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


@dataclass(frozen=True)
class MethodData:
    """An explicit Runge-Kutta method with error control or without, as data."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...]
    error_low: tuple[float, ...]
    interpolant: tuple[tuple[float, ...], ...]
    order: int
    error_order: int
    fsal: bool
    lands: bool
    """Whether a step ends at every output time."""
    between: str
    """How output times within a step are read: one of BETWEEN."""


@dataclass(frozen=True)
class LimitsData:
    """Tolerances, controller and limits of a solve; `first_step` is 0 to choose one."""

    rtol: float
    atol: float
    integral: float
    proportional: float
    derivative: float
    safety: float
    min_factor: float
    max_factor: float
    first_step: float
    max_steps: int
    max_steps_between: int


@dataclass(frozen=True, eq=False)
class Job:
    """What solves of one kind have in common, whatever their numbers: what is made for it is kept, by its identity.

    Args:
        groups: for each feature, the part of the state by which its error counts.
        per_sample: whether each row takes steps of its own.
        records: whether a backward pass will come.
        wants_gradient: which of the program's tensors want a gradient.
        times_move: whether the times want one.
        budget: bytes that may be kept for it; what does not fit is evaluated again.
    """

    program: Program
    method: MethodData
    limits: LimitsData
    groups: tuple[int, ...]
    per_sample: bool = False
    records: bool = False
    wants_gradient: tuple[bool, ...] = ()
    times_move: bool = False
    budget: int = 0


@dataclass
class Task:
    """A solve that the kernels are to do.

    Args:
        tensors: those of the program, contiguous and of the state's type.
        y0: rows of the state, [B, D], contiguous.
        ts: output times in double precision, [T] or [B, T], contiguous.
        grid: ends of the steps of a fixed-step solve.
        slope: what the field itself says at the start, [B, D], to be compared with the program.
    """

    job: Job
    tensors: list[torch.Tensor]
    y0: torch.Tensor
    ts: torch.Tensor
    grid: tuple[float, ...] | None = None
    slope: torch.Tensor | None = None


class Limits(ctypes.Structure):
    """LimitsData as csrc/control.h has it."""

    _fields_ = [
        *((name, Double) for name in (
            "rtol", "atol", "integral", "proportional", "derivative", "safety", "min_factor", "max_factor",
            "first_step")),
        ("max_steps", Long), ("max_steps_between", Long),
    ]  # fmt: skip


class Report(ctypes.Structure):
    """What a solve cost, and where it stopped."""

    _fields_ = [
        ("status", Int),
        *((name, Long) for name in ("accepted", "rejected", "evaluations", "products", "kept_bytes", "steps")),
        ("sizes", Double * 64),  # FIRST_SIZES in csrc/problem.h
    ]
