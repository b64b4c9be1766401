"""What a step does around a field that PyTorch evaluates, on the CPU: each operation is one pass over the memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from neuralode.kernels.library import Runtime, library, runtime
from neuralode.kernels.task import Int, Long, Pointer


class _Slopes(ctypes.Structure):
    _fields_ = [("k", Pointer), ("weights", Pointer), ("used", Int), ("count", Long)]


class _Workers(ctypes.Structure):
    _fields_ = [("runtime", Runtime), ("threads", Int)]


def serves(y: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether these operations can take a state and what goes with it: plain tensors that lie alike in memory."""
    kind = y.dtype, y.shape
    return (
        y.dtype in (torch.float32, torch.float64)
        and y.device.type == "cpu"
        and type(y) is torch.Tensor
        and y.is_contiguous()
        and all(type(x) is torch.Tensor and (x.dtype, x.shape) == kind and x.is_contiguous() for x in others)
        and library() is not None
    )


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


def _call(name: str, like: torch.Tensor, slopes: _Slopes, *rest: int | float) -> float:
    loaded = library()
    assert loaded is not None
    workers = _Workers(runtime(), torch.get_num_threads())
    function = getattr(loaded.functions, f"neuralode_{name}")
    found: float = function(like.dtype == torch.float64, ctypes.addressof(slopes), *rest, ctypes.addressof(workers))
    return found


def _slopes(y: torch.Tensor, slopes: Sequence[torch.Tensor], weights: Sequence[float]) -> tuple[_Slopes, object]:
    """As the kernels read them, and the arrays that have to live as long."""
    arrays = _pointers(slopes), (ctypes.c_double * len(weights))(*weights)
    return _Slopes(ctypes.addressof(arrays[0]), ctypes.addressof(arrays[1]), len(weights), y.numel()), arrays


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (Pointer * max(1, len(tensors)))(*(x.data_ptr() for x in tensors))
