"""How each operation of PyTorch, below autograd, is written as lines of a program."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from neuralode.kernels.values import NotLowered, Row, Writer, key_of

Handler = Callable[[Writer, Any, Any, Any], Any]
aten = torch.ops.aten

HANDLERS: dict[Any, Handler] = {}
MAKERS: set[Any] = set()
"""Operations that make tensors of one number, of nothing but a shape."""


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


# --- element by element --------------------------------------------------------------------------------------------


def elementwise(writer: Writer, out: torch.Tensor, xs: list[Any], write: Callable[..., int]) -> torch.Tensor:
    """An operation on elements: `write(width, *registers)` writes it."""
    squeezed = _squeezed(writer, out.shape, xs)
    operands = [writer.operand(x, out.shape, squeezed) for x in xs]
    width = max(w for _, w in operands)
    register = write(width, *(r for r, _ in operands))
    register = writer.widened(register, width, 1 if squeezed else out.shape[-1])
    return writer.result(out, register, squeezed, xs)


def _squeezed(writer: Writer, shape: torch.Size, xs: list[Any]) -> bool:
    """Whether the result of an element-wise operation has no dimension for features."""
    rows = [(row, x) for x in xs if (row := writer.row(x)) is not None]
    decisive = [row for row, x in rows if not row.uniform and x.dim() == len(shape)]
    if decisive:
        return decisive[0].squeezed
    if any(not row.uniform for row, _ in rows):
        raise NotLowered("rows are spread over rows")
    if len(shape) == 0:
        return True
    return all(row.squeezed for row, x in rows if x.dim() == len(shape)) and tuple(shape) == writer.lead != ()


def _in_place(functional: Any) -> Handler:
    """The handler of an operation that overwrites its first argument, from that of its functional twin."""

    def handler(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
        known = HANDLERS[functional]
        result = known(writer, functional, args, kwargs)
        row = writer.row(result)
        assert row is not None
        if result.shape != args[0].shape:
            raise NotLowered(f"{func} changes a shape")
        writer.assign(args[0], writer.register(row), row.width, (*args, *kwargs.values()))
        return func(*args, **kwargs)

    return handler


def _unary(kind: str) -> Handler:
    def handler(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        return elementwise(writer, out, [args[0]], lambda width, x: writer.emit(kind, x, width=width))

    return handler


for _name in ("tanh", "sigmoid", "relu", "silu", "sin", "cos", "exp", "log", "sqrt", "abs", "reciprocal"):
    HANDLERS[getattr(aten, _name).default] = _unary(_name)


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name, with the defaults of the schema."""
    found = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            found[argument.name] = args[i]
        else:
            found[argument.name] = kwargs.get(argument.name, argument.default_value)
    return found


@handles(aten.softplus.default)
def _softplus(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    constants = (float(given["beta"]), float(given["threshold"]))
    return elementwise(writer, func(*args, **kwargs), [args[0]],
                       lambda width, x: writer.emit("softplus", x, width=width, constants=constants))  # fmt: skip


@handles(aten.elu.default)
def _elu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    if given["scale"] != 1 or given["input_scale"] != 1:
        raise NotLowered("a scaled elu is not known to the kernels")
    return elementwise(writer, func(*args, **kwargs), [args[0]],
                       lambda width, x: writer.emit("elu", x, width=width, constants=(float(given["alpha"]),)))  # fmt: skip


@handles(aten.leaky_relu.default)
def _leaky_relu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    slope = float(_given(func, args, kwargs)["negative_slope"])
    return elementwise(writer, func(*args, **kwargs), [args[0]],
                       lambda width, x: writer.emit("leaky_relu", x, width=width, constants=(slope,)))  # fmt: skip


@handles(aten.gelu.default)
def _gelu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    if _given(func, args, kwargs)["approximate"] != "none":
        raise NotLowered("the approximate gelu is not known to the kernels")
    return elementwise(writer, func(*args, **kwargs), [args[0]], lambda width, x: writer.emit("gelu", x, width=width))


@handles(aten.neg.default)
def _neg(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    return elementwise(writer, func(*args), [args[0]],
                       lambda width, x: writer.emit("scale", x, width=width, constants=(-1.0,)))  # fmt: skip


@handles(aten.rsqrt.default)
def _rsqrt(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    return elementwise(writer, func(*args), [args[0]], lambda width, x: writer.emit(
        "reciprocal", writer.emit("sqrt", x, width=width), width=width))  # fmt: skip


@handles(aten.pow.Tensor_Scalar)
def _pow(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    exponent = float(args[1])

    def write(width: int, x: int) -> int:
        if exponent == 1:
            return x
        if exponent in (0.5, -1.0):
            return writer.emit("sqrt" if exponent == 0.5 else "reciprocal", x, width=width)
        return writer.emit("pow", x, width=width, constants=(exponent,))

    return elementwise(writer, func(*args), [args[0]], write)


@handles(aten.clone.default, aten.contiguous.default, aten.lift_fresh.default)
def _copy(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    return elementwise(writer, func(*args, **kwargs), [args[0]], lambda width, x: x)


@handles(aten._to_copy.default)
def _to_copy(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    if out.dtype != args[0].dtype or out.device != args[0].device:
        raise NotLowered(f"it converts to {out.dtype}")
    return elementwise(writer, out, [args[0]], lambda width, x: x)


def _scaled(writer: Writer, register: int, width: int, factor: float) -> int:
    return writer.emit("scale", register, width=width, constants=(factor,))


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@handles(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    x, y, alpha = args[0], args[1], float(given.get("alpha", 1))
    kind = "sub" if func in (aten.sub.Tensor, aten.sub.Scalar) else "add"
    out = func(*args, **kwargs)
    if _is_number(y):
        offset = float(y) * alpha * (-1 if kind == "sub" else 1)
        return elementwise(writer, out, [x], lambda w, a: writer.emit("shift", a, width=w, constants=(offset,)))
    return elementwise(writer, out, [x, y], lambda w, a, b: writer.emit(
        kind, a, b if alpha == 1 else _scaled(writer, b, writer.width_of(b), alpha), width=w))  # fmt: skip


@handles(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    alpha = float(_given(func, args, kwargs).get("alpha", 1))
    return elementwise(writer, func(*args, **kwargs), [args[0], args[1]], lambda w, a, b: writer.emit(
        "sub", b, _scaled(writer, a, writer.width_of(a), alpha), width=w))  # fmt: skip


@handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _mul(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    x, y = args[0], args[1]
    divides = func in (aten.div.Tensor, aten.div.Scalar)
    out = func(*args, **kwargs)
    if _is_number(y):
        factor = 1 / float(y) if divides and y else float(y)
        if divides and not y:
            raise NotLowered("it divides by zero")
        return elementwise(writer, out, [x], lambda w, a: _scaled(writer, a, w, factor))
    kind = "div" if divides else "mul"
    return elementwise(writer, out, [x, y], lambda w, a, b: writer.emit(kind, a, b, width=w))


@handles(aten.addcmul.default, aten.addcdiv.default)
def _addcmul(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    value, kind = float(_given(func, args, kwargs)["value"]), "mul" if func is aten.addcmul.default else "div"

    def write(width: int, x: int, a: int, b: int) -> int:
        wide = max(writer.width_of(a), writer.width_of(b))
        return writer.emit("add", x, _scaled(writer, writer.emit(kind, a, b, width=wide), wide, value), width=width)

    return elementwise(writer, func(*args, **kwargs), list(args[:3]), write)


@handles(aten.tanh_backward.default, aten.sigmoid_backward.default)
def _activation_backward(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """g (1 - o²) and g (1 - o) o, of fields that differentiate their own layers."""
    smooth = func is aten.tanh_backward.default

    def write(width: int, g: int, o: int) -> int:
        wide = writer.width_of(o)
        square = writer.emit("mul", o, o, width=wide)
        slope = writer.emit("shift", _scaled(writer, square, wide, -1.0), width=wide, constants=(1.0,))
        if not smooth:
            slope = writer.emit("sub", o, square, width=wide)
        return writer.emit("mul", g, slope, width=width)

    return elementwise(writer, func(*args, **kwargs), list(args[:2]), write)


@handles(aten.copy_.default)
def _assign(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    to, source = args[0], args[1]
    row = writer.row(to)
    if row is None:
        raise NotLowered("it changes in place what it was given")
    register, width = writer.operand(source, to.shape, row.squeezed)
    writer.assign(to, register, width, (source,))
    return func(*args, **kwargs)


@handles(aten.fill_.Scalar, aten.zero_.default)
def _refill(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    writer.assign(args[0], writer.constant(float(args[1]) if len(args) > 1 else 0.0, 1), 1, ())
    return func(*args, **kwargs)


for _name in ("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "add_.Scalar", "sub_.Scalar", "mul_.Scalar",
              "div_.Scalar", "tanh_.default", "sigmoid_.default", "relu_.default", "silu_.default", "neg_.default",
              "sin_.default", "cos_.default", "exp_.default", "pow_.Scalar", "elu_.default", "leaky_relu_.default"):  # fmt: skip
    _base, _overload = _name.split("_.")
    _twin = getattr(getattr(aten, _base), "Tensor_Scalar" if _base == "pow" else _overload)
    HANDLERS[getattr(getattr(aten, _base + "_"), _overload)] = _in_place(_twin)


# --- tensors of one number -----------------------------------------------------------------------------------------

_MADE = {
    aten.zeros.default: 0.0, aten.ones.default: 1.0, aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0,
    aten.new_zeros.default: 0.0, aten.new_ones.default: 1.0,
}  # fmt: skip
_FILLED = {aten.full.default, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default}


@handles(*_MADE, *_FILLED)
def _make(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    value = _MADE.get(func, args[0] if func is aten.scalar_tensor.default else args[-1])
    return writer.filled(func(*args, **kwargs), float(value))


@handles(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def _make_empty(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """Taken for zeros: what is not written to before it is read holds no number that could be relied on."""
    return writer.filled(func(*args, **kwargs).zero_(), 0.0)


MAKERS |= {*_MADE, *_FILLED, aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}


# --- products of matrices ------------------------------------------------------------------------------------------


def _linear(writer: Writer, out: torch.Tensor, x: Any, matrix: Any, bias: Any) -> Any:
    """x A + b, A being constant."""
    row = writer.row(x)
    if row is None or writer.row(matrix) is not None or writer.row(bias) is not None:
        raise NotLowered("it multiplies by a matrix that depends on the state or on the time, or mixes rows")
    if row.squeezed or x.shape[-1] != row.width:
        raise NotLowered("it multiplies rows with each other")
    known = writer.transposed.get(key_of(matrix))
    return _layer(writer, out, x, row, matrix if known is None else known, bias, transposed=known is None)


def _layer(writer: Writer, out: torch.Tensor, x: torch.Tensor, row: Row, weight: torch.Tensor, bias: Any,
           transposed: bool = False) -> Any:  # fmt: skip
    """x Wᵀ + b, or x W + b where the weight is to be transposed."""
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    tensors = [writer.tensor(weight, shape, transposed)]
    if bias is not None:
        if bias.numel() != shape[0]:
            raise NotLowered(f"a bias of shape {tuple(bias.shape)} is not one a feature")
        tensors.append(writer.tensor(bias, shape[:1]))
    register = writer.emit("linear", writer.register(row), width=shape[0], tensors=tuple(tensors))
    return writer.result(out, register, False, (x, weight, bias))


@handles(aten.addmm.default)
def _addmm(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    if given["beta"] != 1 or given["alpha"] != 1:
        raise NotLowered("a scaled addmm is not known to the kernels")
    return _linear(writer, func(*args, **kwargs), args[1], args[2], args[0])


@handles(aten.mm.default)
def _mm(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    return _linear(writer, func(*args), args[0], args[1], None)


@handles(aten.linear.default)
def _whole_linear(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    row = writer.row(args[0])
    if row is None or row.squeezed or writer.row(args[1]) is not None or writer.row(given["bias"]) is not None:
        raise NotLowered("it multiplies by a matrix that depends on the state or on the time")
    return _layer(writer, func(*args, **kwargs), args[0], row, args[1], given["bias"])


@handles(aten.mv.default, aten.addmv.default)
def _mv(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """W y (+ b) for a single row y [K]."""
    given = _given(func, args, kwargs)
    weight, y = args[-2], args[-1]
    row = writer.row(y)
    if row is None or row.squeezed or not row.uniform or writer.row(weight) is not None:
        raise NotLowered("it multiplies rows with each other")
    if given.get("beta", 1) != 1 or given.get("alpha", 1) != 1 or writer.row(args[0] if len(args) > 2 else None):
        raise NotLowered(f"{func} is not known to the kernels in this form")
    return _layer(writer, func(*args, **kwargs), y, row, weight, args[0] if len(args) > 2 else None)


# --- features ------------------------------------------------------------------------------------------------------


@handles(aten.sum.dim_IntList, aten.mean.dim)
def _sum(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = _given(func, args, kwargs)
    x, row = args[0], writer.row(args[0])
    dims = [] if given["dim"] is None else [d % x.dim() for d in given["dim"]] if x.dim() else []
    if row is None or row.squeezed or dims != [x.dim() - 1] or given.get("dtype") not in (None, x.dtype):
        raise NotLowered("it sums over rows")
    register = writer.emit("sum", writer.register(row), width=1)
    if func is aten.mean.dim:
        register = _scaled(writer, register, 1, 1 / row.width)
    return writer.result(func(*args, **kwargs), register, not given["keepdim"], [x])


@handles(aten.cat.default)
def _cat(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    parts, dim = args[0], _given(func, args, kwargs)["dim"]
    out = func(*args, **kwargs)
    if dim % out.dim() != out.dim() - 1:
        raise NotLowered("it puts rows one after the other")
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
    parts, dim = args[0], _given(func, args, kwargs)["dim"]
    out = func(*args, **kwargs)
    if dim % out.dim() != out.dim() - 1:
        raise NotLowered("it stacks other than features")
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


@handles(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
         aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.detach.default)  # fmt: skip
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
    squeezed = x.dim() == 0 and tuple(out.shape) == writer.lead and tuple(out.shape) != (writer.width,)
    if row.uniform and writer.rows_of(out.shape, squeezed) not in (1, writer.count):
        raise NotLowered("it spreads a value over other rows than the state's")
    width = 1 if squeezed or out.dim() == 0 else out.shape[-1]
    return writer.result(out, writer.widened(writer.register(row), row.width, width), squeezed, [x])


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
    given, x = _given(func, args, kwargs), args[0]
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
    row = _features(writer, args[0], _given(func, args, kwargs)["dim"])
    outs, start = func(*args, **kwargs), 0
    single = func is aten.unbind.int
    for out in outs:
        _part(writer, out, row, start, squeezed=single)
        start += 1 if single else out.shape[-1]
    return outs
