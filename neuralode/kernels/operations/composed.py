"""Functions of which each takes several lines of a program."""

from __future__ import annotations

import math
from typing import Any

import torch

from neuralode.kernels.operations.elementwise import elementwise
from neuralode.kernels.operations.registry import given_by, handles, scaled
from neuralode.kernels.values import NotLowered, Writer

aten = torch.ops.aten
_LINEAR_FROM = 40.0
"""Where ln(1 + eˣ) is x to the last digit of double precision."""


def _softplus(writer: Writer, x: int, width: int) -> int:
    return writer.emit("softplus", x, width=width, constants=(1.0, _LINEAR_FROM))


@handles(aten.native_layer_norm.default)
def _layer_norm(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """(x - mean) / √(variance + eps), times the weight, plus the bias; also the mean, and one over the root."""
    given = given_by(func, args, kwargs)
    x, row = given["input"], writer.row(given["input"])
    if row is None or row.squeezed or list(given["normalized_shape"]) != [row.width] or row.width == 1:
        raise NotLowered("it normalizes over rows")
    out, mean, scale = func(*args, **kwargs)
    width, register = row.width, writer.register(row)

    def averaged(values: int) -> int:
        return scaled(writer, writer.emit("sum", values, width=1), 1, 1 / width)

    middle = averaged(register)
    apart = writer.emit("sub", register, middle, width=width)
    variance = averaged(writer.emit("mul", apart, apart, width=width))
    root = writer.emit("sqrt", writer.emit("shift", variance, width=1, constants=(float(given["eps"]),)), width=1)
    over_root = writer.emit("reciprocal", root, width=1)
    found = writer.emit("mul", apart, over_root, width=width)
    for kind in ("weight", "bias"):
        if given[kind] is not None:
            factor, _ = writer.operand(given[kind], out.shape, False)
            found = writer.emit("mul" if kind == "weight" else "add", found, factor, width=width)
    sources = [x, given["weight"], given["bias"]]
    return (
        writer.result(out, found, False, sources),
        writer.result(mean, middle, False, [x]),
        writer.result(scale, over_root, False, [x]),
    )


@handles(aten.mish.default)
def _mish(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    def write(width: int, x: int) -> int:
        gate = writer.emit("tanh", _softplus(writer, x, width), width=width)
        return writer.emit("mul", x, gate, width=width)

    return elementwise(writer, func(*args), [args[0]], write)


@handles(aten.log_sigmoid_forward.default)
def _log_sigmoid(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    def write(width: int, x: int) -> int:
        return scaled(writer, _softplus(writer, scaled(writer, x, width, -1.0), width), width, -1.0)

    out, buffer = func(*args)
    return elementwise(writer, out, [args[0]], write), buffer


@handles(aten.exp2.default, aten.pow.Scalar)
def _power_of_a_number(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    base = 2.0 if func is aten.exp2.default else float(args[0])
    if base <= 0:
        raise NotLowered(f"it raises {base:g} to a power")
    return elementwise(writer, func(*args), [args[-1]], lambda width, x: writer.emit(
        "exp", scaled(writer, x, width, math.log(base)), width=width))  # fmt: skip


@handles(aten.elu.default, aten.celu.default)
def _elu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """s x where x > 0, else s α (exp(r x) - 1)."""
    given = given_by(func, args, kwargs)
    alpha, scale = float(given["alpha"]), float(given.get("scale", 1))
    rate = float(given["input_scale"]) if func is aten.elu.default else 1 / alpha
    if rate <= 0:
        raise NotLowered("an exponential linear unit that falls is not known to the kernels")

    def write(width: int, x: int) -> int:
        inner = scaled(writer, x, width, rate)
        found = writer.emit("elu", inner, width=width, constants=(alpha * rate,))
        return scaled(writer, found, width, scale / rate)

    return elementwise(writer, func(*args, **kwargs), [given["self"]], write)


@handles(aten.gelu.default)
def _gelu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    def write(width: int, x: int) -> int:
        """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), or with the error function."""
        if given_by(func, args, kwargs)["approximate"] == "none":
            return writer.emit("gelu", x, width=width)
        cube = scaled(writer, writer.emit("pow", x, width=width, constants=(3.0,)), width, 0.044715)
        inner = scaled(writer, writer.emit("add", x, cube, width=width), width, math.sqrt(2 / math.pi))
        gate = writer.emit("shift", writer.emit("tanh", inner, width=width), width=width, constants=(1.0,))
        return writer.emit("mul", scaled(writer, x, width, 0.5), gate, width=width)

    return elementwise(writer, func(*args, **kwargs), [args[0]], write)


@handles(aten.glu.default)
def _glu(writer: Writer, func: Any, args: Any, kwargs: Any) -> Any:
    """The first half of the features, times the sigmoid of the second."""
    x, dim, row = args[0], given_by(func, args, kwargs)["dim"], writer.row(args[0])
    if row is None or row.squeezed or dim % x.dim() != x.dim() - 1:
        raise NotLowered("it takes some of the rows")
    half = row.width // 2
    first, second = (writer.register(row._replace(start=row.start + n * half, width=half)) for n in (0, 1))
    gated = writer.emit("mul", first, writer.emit("sigmoid", second, width=half), width=half)
    return writer.result(func(*args, **kwargs), gated, False, [x])
