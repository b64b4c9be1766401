"""Operations element by element, and the tensors of one number that they work on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from neuralode.kernels.operations.registry import HANDLERS, MAKERS, Handler, given_by, handles, scaled
from neuralode.kernels.values import NotLowered, Writer

aten = torch.ops.aten


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
    return all(row.squeezed for row, x in rows if x.dim() == len(shape)) and writer.guess_squeezed(shape)


def _in_place(functional: Any) -> Handler:
    """The handler of an operation that overwrites its first argument, from that of its functional twin."""

    def handler(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
        known = HANDLERS[functional]
        result = known(writer, functional, args, kwargs)
        row = writer.row(result, new=True)
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


@handles(aten.softplus.default)
def _softplus(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = given_by(func, args, kwargs)
    constants = (float(given["beta"]), float(given["threshold"]))
    return elementwise(writer, func(*args, **kwargs), [args[0]],
                       lambda width, x: writer.emit("softplus", x, width=width, constants=constants))  # fmt: skip


@handles(aten.leaky_relu.default)
def _leaky_relu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    slope = float(given_by(func, args, kwargs)["negative_slope"])
    return elementwise(writer, func(*args, **kwargs), [args[0]],
                       lambda width, x: writer.emit("leaky_relu", x, width=width, constants=(slope,)))  # fmt: skip


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


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


@handles(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar)
def _add(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    given = given_by(func, args, kwargs)
    x, y, alpha = args[0], args[1], float(given.get("alpha", 1))
    kind = "sub" if func in (aten.sub.Tensor, aten.sub.Scalar) else "add"
    out = func(*args, **kwargs)
    if _is_number(y):
        offset = float(y) * alpha * (-1 if kind == "sub" else 1)
        return elementwise(writer, out, [x], lambda w, a: writer.emit("shift", a, width=w, constants=(offset,)))
    return elementwise(writer, out, [x, y], lambda w, a, b: writer.emit(
        kind, a, b if alpha == 1 else scaled(writer, b, writer.width_of(b), alpha), width=w))  # fmt: skip


@handles(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    alpha = float(given_by(func, args, kwargs).get("alpha", 1))
    return elementwise(writer, func(*args, **kwargs), [args[0], args[1]], lambda w, a, b: writer.emit(
        "sub", b, scaled(writer, a, writer.width_of(a), alpha), width=w))  # fmt: skip


@handles(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def _mul(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    x, y = args[0], args[1]
    divides = func in (aten.div.Tensor, aten.div.Scalar)
    out = func(*args, **kwargs)
    if _is_number(y):
        factor = 1 / float(y) if divides and y else float(y)
        if divides and not y:
            raise NotLowered("it divides by zero")
        return elementwise(writer, out, [x], lambda w, a: scaled(writer, a, w, factor))
    kind = "div" if divides else "mul"
    return elementwise(writer, out, [x, y], lambda w, a, b: writer.emit(kind, a, b, width=w))


@handles(aten.addcmul.default, aten.addcdiv.default)
def _addcmul(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    value, kind = float(given_by(func, args, kwargs)["value"]), "mul" if func is aten.addcmul.default else "div"

    def write(width: int, x: int, a: int, b: int) -> int:
        wide = max(writer.width_of(a), writer.width_of(b))
        return writer.emit("add", x, scaled(writer, writer.emit(kind, a, b, width=wide), wide, value), width=width)

    return elementwise(writer, func(*args, **kwargs), list(args[:3]), write)


@handles(aten.tanh_backward.default, aten.sigmoid_backward.default)
def _activation_backward(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """g (1 - o²) and g (1 - o) o, of fields that differentiate their own layers."""
    smooth = func is aten.tanh_backward.default

    def write(width: int, g: int, o: int) -> int:
        wide = writer.width_of(o)
        square = writer.emit("mul", o, o, width=wide)
        slope = writer.emit("shift", scaled(writer, square, wide, -1.0), width=wide, constants=(1.0,))
        if not smooth:
            slope = writer.emit("sub", o, square, width=wide)
        return writer.emit("mul", g, slope, width=width)

    return elementwise(writer, func(*args, **kwargs), list(args[:2]), write)


@handles(aten.copy_.default, aten.fill_.Tensor)
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


for _name in (
    "add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "add_.Scalar", "sub_.Scalar", "mul_.Scalar",
    "div_.Scalar", "tanh_.default", "sigmoid_.default", "relu_.default", "silu_.default", "neg_.default",
    "sin_.default", "cos_.default", "exp_.default", "pow_.Scalar", "elu_.default", "leaky_relu_.default",
):  # fmt: skip
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
    out = func(*args, **kwargs)
    rounded = torch.full((), value, dtype=out.dtype, device="cpu")  # as the tensor has it
    return writer.filled(out, float(rounded))


@handles(aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
def _make_empty(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """Taken for zeros: what is not written to before it is read holds no number that could be relied on."""
    return writer.filled(func(*args, **kwargs).zero_(), 0.0)


MAKERS |= {*_MADE, *_FILLED, aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default}
