"""Sums, parts and joins of the features of a row, and views of whole rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from neuralode.kernels.operations.registry import given_by, handles, scaled
from neuralode.kernels.values import NotLowered, Row, Writer

aten = torch.ops.aten


# --- features ------------------------------------------------------------------------------------------------------


@handles(aten.sum.dim_IntList, aten.mean.dim)
def _sum(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = given_by(func, args, kwargs)
    x, row = args[0], writer.row(args[0])
    dims = [] if given["dim"] is None else [d % x.dim() for d in given["dim"]] if x.dim() else []
    if row is None or row.squeezed or dims != [x.dim() - 1] or given.get("dtype") not in (None, x.dtype):
        raise NotLowered("it sums over rows")
    register = writer.emit("sum", writer.register(row), width=1)
    if func is aten.mean.dim:
        register = scaled(writer, register, 1, 1 / row.width)
    return writer.result(func(*args, **kwargs), register, not given["keepdim"], [x])


def _joined(func: Any, args: Any, kwargs: Any, refusal: str) -> tuple[Any, torch.Tensor]:
    """The parts of a join and what comes of it, which has to be along the last dimension."""
    out, dim = func(*args, **kwargs), given_by(func, args, kwargs)["dim"]
    if dim % out.dim() != out.dim() - 1:
        raise NotLowered(refusal)
    return args[0], out


@handles(aten.cat.default)
def _cat(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    parts, out = _joined(func, args, kwargs, "it puts rows one after the other")
    registers, widths = [], []
    for part in parts:
        row = writer.row(part)
        if row is not None and row.squeezed:
            raise NotLowered("it puts rows one after the other")
        register, width = writer.operand(part, part.shape, False)
        if row is None and writer.fill(part) is None and part.dim() > 1 and math.prod(part.shape[:-1]) != writer.count:
            raise NotLowered("it puts together rows of different number")
        registers.append(writer.widened(register, width, part.shape[-1]))
        widths.append(part.shape[-1])
    return writer.result(out, writer.emit("concat", *registers, width=sum(widths)), False, parts)


@handles(aten.stack.default)
def _stack(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    parts, out = _joined(func, args, kwargs, "it stacks other than features")
    registers = []
    for part in parts:
        row = writer.row(part)
        if row is not None and not (row.squeezed or row.width == 1 == part.numel()):
            raise NotLowered("it stacks features into another dimension")
        registers.append(writer.operand(part, part.shape, True)[0])
    return writer.result(out, writer.emit("concat", *registers, width=len(parts)), False, parts)


# --- views ---------------------------------------------------------------------------------------------------------


def _same_elements(writer: Writer, out: torch.Tensor, row: Row) -> torch.Tensor:
    """A view of the same elements in the same order."""
    if row.width == 1:
        squeezed = out.dim() == 0 or out.shape[-1] != 1
    elif out.dim() and out.shape[-1] == row.width:
        squeezed = False
    else:
        raise NotLowered("it takes features apart, or together with rows")
    rows = writer.rows_of(out.shape, squeezed)
    return writer.know(out, row._replace(squeezed=squeezed, uniform=rows == 1))


@handles(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default,
)  # fmt: skip
def _view(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    row, x = writer.row(args[0]), args[0]
    assert row is not None
    out = func(*args, **kwargs)
    if func in (aten.alias.default, aten.detach.default):
        writer.keep(out)
        return out
    if func is aten.unsqueeze.default and row.width > 1 and args[1] % out.dim() == out.dim() - 1:
        raise NotLowered("it adds a dimension after the features")
    if (
        func is aten.unsqueeze.default
        and row.squeezed
        and x.shape[-1:] == (1,)
        and args[1] % out.dim() != out.dim() - 1
    ):
        raise NotLowered("it is not clear which dimension holds the features")
    return _same_elements(writer, out, row)


@handles(aten.expand.default)
def _expand(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    row, x = writer.row(args[0]), args[0]
    assert row is not None
    out = func(*args, **kwargs)
    if out.shape == x.shape:
        return writer.know(out, row)
    if row.squeezed and x.dim():
        raise NotLowered("it spreads rows over rows")
    padded = (*[1] * (out.dim() - x.dim()), *x.shape)
    if not row.uniform and (padded[:-1] != tuple(out.shape[:-1]) or out.dim() != x.dim()):
        raise NotLowered("it spreads rows over rows")
    squeezed = x.dim() == 0 and writer.guess_squeezed(out.shape)
    if row.uniform and writer.rows_of(out.shape, squeezed) not in (1, writer.count):
        raise NotLowered("it spreads a value over other rows than the state's")
    width = 1 if squeezed or out.dim() == 0 else out.shape[-1]
    writer.fix(x)  # a view with a root of its own
    writer.result(out, writer.widened(writer.register(row), row.width, width), squeezed, [x])
    writer.fix(out)
    return out


def _features(writer: Writer, x: torch.Tensor, dim: int) -> Row:
    """The row value of which a view takes features along a dimension."""
    row = writer.row(x)
    assert row is not None
    if row.squeezed or dim % x.dim() != x.dim() - 1:
        raise NotLowered("it takes some of the rows")
    return row


def _part(writer: Writer, out: torch.Tensor, row: Row, start: int, squeezed: bool = False) -> torch.Tensor:
    width = 1 if squeezed else out.shape[-1]
    uniform = writer.rows_of(out.shape, squeezed) == 1
    return writer.know(out, Row(row.root, row.start + start, width, squeezed, uniform))


@handles(aten.slice.Tensor)
def _slice(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given, x = given_by(func, args, kwargs), args[0]
    dim, size = given["dim"] % x.dim(), x.shape[given["dim"]]
    out = func(*args, **kwargs)
    if out.shape == x.shape:
        row = writer.row(x)
        assert row is not None
        return writer.know(out, row)
    if given["step"] != 1:
        raise NotLowered("it takes every other feature")
    row = _features(writer, x, dim)
    start = given["start"] or 0
    return _part(writer, out, row, min(max(start + size if start < 0 else start, 0), size))


@handles(aten.select.int)
def _select(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    x, dim, index = args
    out = func(*args)
    row = writer.row(x)
    assert row is not None
    if x.shape[dim] == 1 and dim % x.dim() != x.dim() - 1:
        return _same_elements(writer, out, row)
    return _part(writer, out, _features(writer, x, dim), index % x.shape[dim], squeezed=True)


@handles(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    row = _features(writer, args[0], given_by(func, args, kwargs)["dim"])
    outs, start = func(*args, **kwargs), 0
    single = func is aten.unbind.int
    for out in outs:
        _part(writer, out, row, start, squeezed=single)
        start += 1 if single else out.shape[-1]
    return outs
