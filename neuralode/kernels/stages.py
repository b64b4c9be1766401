"""What a step does around a field that PyTorch evaluates, on the CPU: each operation is one pass over the memory."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from neuralode.kernels.library import Runtime, library, runtime
from neuralode.kernels.task import Double, Int, Limits, Long, Pointer

_DTYPES = (torch.float32, torch.float64)


class _Slopes(ctypes.Structure):
    _fields_ = [("k", Pointer), ("weights", Pointer), ("used", Int), ("count", Long)]


class _Workers(ctypes.Structure):
    _fields_ = [("runtime", Runtime), ("threads", Int)]


def serves(y: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether these operations can take a state and what goes with it: plain tensors that lie alike in memory."""
    dtype, count = y.dtype, y.numel()
    if not (y.is_cpu and dtype in _DTYPES and type(y) is torch.Tensor and y.is_contiguous()):
        return False
    for x in others:
        if type(x) is not torch.Tensor or x.dtype is not dtype or x.numel() != count or not x.is_contiguous():
            return False
    return library() is not None


def take_stage(y: torch.Tensor, slopes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """y + Σⱼ weights[j]·slopes[j]."""
    out = torch.empty_like(y)
    given, alive = _slopes(y, slopes, weights)
    _call("take_stage", y, given, y.data_ptr(), out.data_ptr())
    del alive
    return out


def pull_stage(g: torch.Tensor, weights: Sequence[float]) -> list[torch.Tensor]:
    """The transpose of `take_stage` for its slopes: weights[j]·g."""
    found = [torch.empty_like(g) for _ in weights]
    given, alive = _slopes(g, (), weights)
    to = _pointers(found)
    _call("pull_stage", g, given, g.data_ptr(), ctypes.addressof(to))
    del alive
    return found


def error_ratio(slopes: Sequence[torch.Tensor], weights: Sequence[float], y: torch.Tensor, y1: torch.Tensor,
                rtol: float, atol: float) -> float:  # fmt: skip
    """Root mean square of Σⱼ weights[j]·slopes[j] over rtol·max(|y|, |y1|) + atol."""
    given, alive = _slopes(y, slopes, weights)
    ratio: float = _call("error_ratio", y, given, y.data_ptr(), y1.data_ptr(), rtol, atol)
    del alive
    return ratio


class _RowControl(ctypes.Structure):
    _fields_ = [
        ("limits", Limits), ("order", Int),
        *((name, Pointer) for name in (
            "h", "t", "end", "stretch", "ceiling", "last", "before", "lands", "ended", "output",
            "moved", "next_t", "next_h", "size", "next_ceiling", "next_last", "next_before",
            "landed", "accepted", "broken", "now_ended", "next_lands", "next_output", "times")),
        ("outputs", Int), ("most", Int), ("smallest", Double),
    ]  # fmt: skip


class RowSteps(NamedTuple):
    """Steps of the rows' own that they try, [R] each, numbers in double precision."""

    h: torch.Tensor
    """Signed sizes of the steps."""
    t: torch.Tensor
    """Where they start."""
    end: torch.Tensor
    """The last time of each row."""
    stretch: torch.Tensor
    """How much longer than the controller wants it a step may be, to end there."""
    ceiling: torch.Tensor
    """How much longer than this step the next may be."""
    last: torch.Tensor
    """Error ratio of the last accepted step."""
    before: torch.Tensor
    """And of the one before that."""
    lands: torch.Tensor
    """Whether the step ends at the last time."""
    ended: torch.Tensor
    """Whether the row was there before."""
    output: torch.Tensor
    """Index of the output time that comes next."""
    times: torch.Tensor
    """The output times, [R, T]."""


class Judged(NamedTuple):
    """What becomes of their steps."""

    accepted: torch.Tensor
    broken: torch.Tensor
    """Whether the error is not finite."""
    moved: torch.Tensor
    """How far each row goes: h where the step is accepted, else zero."""
    landed: torch.Tensor
    """Whether it comes to its last time by it."""
    size: torch.Tensor
    """What the controller wants the next step to be."""
    after: RowSteps
    """The steps that come next."""
    breaks: int
    """How many are broken."""
    smallest: float
    """Of the sizes of those that have not ended; infinite where all have."""
    most: int
    """Output times before its last that a row passed, at most."""


class RowJudge:
    """Says of one step after the other which rows accept it, and which steps come next.

    What a solve or its graph may hold on to lies in memory of its own; the rest is written over at the next step.

    Args:
        control: integral, proportional, derivative, safety, min_factor and max_factor of a Controller.
        order: the error's estimate is O(h^order).
        steps: the first that are judged.
    """

    def __init__(self, tolerances: tuple[float, float], control: tuple[float, ...], order: int, steps: RowSteps):
        written = {"ceiling", "last", "before", "ended"}
        self.steps = RowSteps(*[
            x.clone(memory_format=torch.contiguous_format) if name in written else x.contiguous()
            for name, x in steps._asdict().items()
        ])  # fmt: skip
        self._size, self._broken = torch.empty_like(steps.h), torch.empty_like(steps.ended)
        at = {name: x.data_ptr() for name, x in self.steps._asdict().items()}
        remembered = {"next_last": at["last"], "next_before": at["before"]} if control[1] or control[2] else {}
        self._control = _RowControl(
            Limits(*tolerances, *control), order, **at, **remembered, size=self._size.data_ptr(),
            next_ceiling=at["ceiling"], broken=self._broken.data_ptr(), now_ended=at["ended"],
            outputs=steps.times.shape[1],
        )  # fmt: skip

    def __call__(self, slopes: Sequence[torch.Tensor], weights: Sequence[float], y: torch.Tensor,
                 y1: torch.Tensor) -> Judged:  # fmt: skip
        """What becomes of the steps from y to y1, whose error is h · Σⱼ weights[j]·slopes[j]."""
        control, steps, count = self._control, self.steps, len(self._size)
        kept = torch.empty(2, count, dtype=torch.double)
        h, output = torch.empty(count, dtype=torch.double), torch.empty(count, dtype=torch.long)
        accepted, landed, lands = [torch.empty(count, dtype=torch.bool) for _ in range(3)]
        control.moved = kept.data_ptr()
        control.next_t = control.moved + count * kept.element_size()
        control.next_h, control.next_output, control.next_lands = h.data_ptr(), output.data_ptr(), lands.data_ptr()
        control.accepted, control.landed = accepted.data_ptr(), landed.data_ptr()
        given, alive = _slopes(y, slopes, weights)
        breaks = _call("judge_rows", y, given, y.data_ptr(), y1.data_ptr(), count, ctypes.addressof(control))
        del alive
        control.t, control.h = control.next_t, control.next_h
        control.output, control.lands = control.next_output, control.next_lands
        moved, t = kept.unbind()
        self.steps = RowSteps(h, t, steps.end, steps.stretch, steps.ceiling, steps.last, steps.before, lands,
                              steps.ended, output, steps.times)  # fmt: skip
        return Judged(accepted, self._broken, moved, landed, self._size, self.steps, int(breaks), control.smallest,
                      control.most)  # fmt: skip


def _call(name: str, like: torch.Tensor, slopes: _Slopes, *rest: int | float) -> float:
    loaded = library()
    assert loaded is not None
    workers = _workers(torch.get_num_threads())
    function = getattr(loaded.functions, f"neuralode_{name}")
    found: float = function(like.dtype == torch.float64, ctypes.addressof(slopes), *rest, ctypes.addressof(workers))
    return found


@functools.cache
def _workers(threads: int) -> _Workers:
    return _Workers(runtime(), threads)


def _slopes(y: torch.Tensor, slopes: Sequence[torch.Tensor], weights: Sequence[float]) -> tuple[_Slopes, object]:
    """As the kernels read them, and the arrays that have to live as long."""
    arrays = _pointers(slopes), (ctypes.c_double * len(weights))(*weights)
    return _Slopes(ctypes.addressof(arrays[0]), ctypes.addressof(arrays[1]), len(weights), y.numel()), arrays


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (Pointer * max(1, len(tensors)))(*[x.data_ptr() for x in tensors])
