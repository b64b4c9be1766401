"""Products with matrices that are constant during a solve."""

from __future__ import annotations

from typing import Any

import torch

from neuralode.kernels.operations.registry import given_by, handles
from neuralode.kernels.values import NotLowered, Row, Writer, key_of

aten = torch.ops.aten


def _linear(writer: Writer, out: torch.Tensor, x: Any, matrix: Any, bias: Any) -> Any:
    """x A + b, A being constant."""
    row = writer.row(x)
    if row is None or writer.row(matrix) is not None or writer.row(bias) is not None:
        raise NotLowered("it multiplies by a matrix that depends on the state or on the time, or mixes rows")
    if row.squeezed or x.shape[-1] != row.width:
        raise NotLowered("it multiplies rows with each other")
    known = writer.transposed.get(key_of(matrix))
    if known is not None and writer.grad and not _is_transpose(matrix, known):
        known = None
    return _layer(writer, out, x, row, matrix if known is None else known, bias, transposed=known is None)


def _is_transpose(matrix: torch.Tensor, known: torch.Tensor) -> bool:
    """Whether a matrix is the transpose of another to autograd too: memory alone does not tell a detached one."""
    if not matrix.requires_grad or matrix.grad_fn is None:
        return not matrix.requires_grad and not known.requires_grad
    source = matrix.grad_fn.next_functions[0][0]
    return source is known.grad_fn if known.grad_fn is not None else getattr(source, "variable", None) is known


def _layer(writer: Writer, out: torch.Tensor, x: torch.Tensor, row: Row, weight: torch.Tensor, bias: Any,
           transposed: bool = False) -> Any:  # fmt: skip
    """x Wᵀ + b, or x W + b where the weight is to be transposed."""
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    tensors = [writer.tensor(weight, shape, transposed)]
    if bias is not None:
        if bias.numel() != shape[0] or bias.shape[-1:] != shape[:1]:
            raise NotLowered(f"a bias of shape {tuple(bias.shape)} is not one a feature")
        tensors.append(writer.tensor(bias, shape[:1]))
    register = writer.emit("linear", writer.register(row), width=shape[0], tensors=tuple(tensors))
    return writer.result(out, register, False, (x, weight, bias))


@handles(aten.addmm.default)
def _addmm(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = given_by(func, args, kwargs)
    if given["beta"] != 1 or given["alpha"] != 1:
        raise NotLowered("a scaled addmm is not known to the kernels")
    return _linear(writer, func(*args, **kwargs), args[1], args[2], args[0])


@handles(aten.mm.default)
def _mm(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    return _linear(writer, func(*args), args[0], args[1], None)


@handles(aten.linear.default)
def _whole_linear(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = given_by(func, args, kwargs)
    row = writer.row(args[0])
    if row is None or row.squeezed or writer.row(args[1]) is not None or writer.row(given["bias"]) is not None:
        raise NotLowered("it multiplies by a matrix that depends on the state or on the time")
    return _layer(writer, func(*args, **kwargs), args[0], row, args[1], given["bias"])


@handles(aten.mv.default, aten.addmv.default)
def _mv(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """W y (+ b) for a single row y [K]."""
    given = given_by(func, args, kwargs)
    weight, y = args[-2], args[-1]
    row = writer.row(y)
    if row is None or row.squeezed or not row.uniform or writer.row(weight) is not None:
        raise NotLowered("it multiplies rows with each other")
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or writer.row(args[0] if len(args) > 2 else None):
        raise NotLowered(f"{func} is not known to the kernels in this form")
    return _layer(writer, func(*args, **kwargs), y, row, weight, args[0] if len(args) > 2 else None)
