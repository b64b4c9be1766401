"""Programs to try the kernels on: one for every operation, and random ones."""

from __future__ import annotations

import random

import torch

from neuralode.kernels.program import STATE, TIME, Operation, Program

Case = tuple[Program, list[torch.Tensor]]

UNARY_CONSTANTS: dict[str, tuple[float, ...]] = {
    "softplus": (1.3, 4.0), "elu": (0.8,), "leaky_relu": (0.1,), "pow": (3.0,), "scale": (-0.7,), "shift": (0.4,),
}  # fmt: skip
POSITIVE = {"log", "sqrt", "reciprocal"}
"""Functions that want arguments above zero."""


class Builder:
    """Writes a program line by line; its tensors are random, in double precision, and want gradients."""

    def __init__(self, width: int, rows: int, seed: int = 0):
        self.width, self.rows = width, rows
        self.operations: list[Operation] = []
        self.tensors: list[torch.Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, kind: str, *inputs: int, width: int, tensors: tuple[int, ...] = (),
                 constants: tuple[float, ...] = ()) -> int:  # fmt: skip
        self.operations.append(Operation(kind, inputs, width, tensors, constants))
        return len(self.operations) + 1

    def tensor(self, *shape: int, scale: float = 1.0) -> int:
        """A new tensor; -1 rows means one a sample."""
        actual = [self.rows if n == -1 else n for n in shape]
        value = scale * torch.randn(actual, generator=self.generator, dtype=torch.float64)
        self.tensors.append(value.requires_grad_())
        self.shapes.append(shape)
        return len(self.tensors) - 1

    def linear(self, x: int, inputs: int, outputs: int, bias: bool = True) -> int:
        weight = self.tensor(outputs, inputs, scale=inputs**-0.5)
        given = (weight, self.tensor(outputs)) if bias else (weight,)
        return self("linear", x, width=outputs, tensors=given)

    def done(self, output: int) -> Case:
        return Program(self.width, tuple(self.operations), output, tuple(self.shapes)), self.tensors


def mlp(width: int, hidden: list[int], rows: int, activation: str = "tanh", time: bool = False) -> Case:
    """A network of linear layers, the time an extra input of the first if asked for."""
    b = Builder(width, rows)
    x, size = STATE, width
    if time:
        x, size = b("concat", STATE, TIME, width=width + 1), width + 1
    for wide in hidden:
        x = b.linear(x, size, wide)
        x = b(activation, x, width=wide, constants=UNARY_CONSTANTS.get(activation, ()))
        size = wide
    return b.done(b.linear(x, size, width))


def unary(kind: str, rows: int) -> Case:
    """A field with that function of the state in it, its argument where the function is smooth."""
    b = Builder(3, rows)
    x = b("scale", STATE, width=3, constants=(0.5,))
    if kind in POSITIVE:
        x = b("shift", b("mul", x, x, width=3), width=3, constants=(0.5,))
    y = b(kind, x, width=3, constants=UNARY_CONSTANTS.get(kind, ()))
    return b.done(b("sub", b("scale", y, width=3, constants=(0.3,)), STATE, width=3))


def lorenz(rows: int) -> Case:
    """The Lorenz system with learned coefficients, put together from slices."""
    b = Builder(3, rows)
    x, y, z = (b("slice", STATE, width=1, constants=(i,)) for i in range(3))
    sigma, rho = (b("tensor", width=1, tensors=(b.tensor(1),)) for _ in range(2))
    dx = b("mul", sigma, b("sub", y, x, width=1), width=1)
    dy = b("sub", b("mul", x, b("sub", rho, z, width=1), width=1), y, width=1)
    dz = b("sub", b("mul", x, y, width=1), b("scale", z, width=1, constants=(8 / 3,)), width=1)
    return b.done(b("concat", dx, dy, dz, width=3))


def van_der_pol(rows: int) -> Case:
    """Each sample has a stiffness of its own."""
    b = Builder(2, rows)
    mu = b("rows", width=1, tensors=(b.tensor(-1, 1),))
    x, v = (b("slice", STATE, width=1, constants=(i,)) for i in range(2))
    square = b("pow", x, width=1, constants=(2.0,))
    damping = b(
        "mul", mu, b("shift", b("scale", square, width=1, constants=(-1.0,)), width=1, constants=(1.0,)), width=1
    )
    return b.done(b("concat", v, b("sub", b("mul", damping, v, width=1), x, width=1), width=2))


def gated(width: int, rows: int) -> Case:
    """FFJORD's concat-squash layer, a gate and a bias that depend on the time, and a sum over features."""
    b = Builder(width, rows)
    gate = b("sigmoid", b.linear(TIME, 1, width), width=width)
    bias = b.linear(TIME, 1, width, bias=False)
    layer = b("add", b("mul", b.linear(STATE, width, width), gate, width=width), bias, width=width)
    mean = b("scale", b("sum", layer, width=1), width=1, constants=(1 / width,))
    spread = b("div", b("sub", layer, mean, width=width), b("shift", b("mul", mean, mean, width=1), width=1,
               constants=(1.0,)), width=width)  # fmt: skip
    constant = b("constant", width=1, constants=(0.1,))
    return b.done(b("add", b("tanh", spread, width=width), constant, width=width))


def random_program(seed: int, rows: int) -> Case:
    """About ten operations whose values stay moderate."""
    draw = random.Random(seed)
    width = draw.choice([1, 2, 3, 7, 17])
    b = Builder(width, rows, seed)
    known = [(STATE, width), (TIME, 1)]
    for _ in range(10):
        x, wide = draw.choice(known)
        kind = draw.choice(
            [
                "linear",
                "tanh",
                "sigmoid",
                "silu",
                "sin",
                "mul",
                "add",
                "sub",
                "concat",
                "slice",
                "sum",
                "tensor",
                "rows",
            ]
        )
        if kind == "linear":
            wide_out = draw.choice([1, 2, 5, 16, 33])
            known.append((b.linear(x, wide, wide_out, draw.random() < 0.7), wide_out))
        elif kind in ("mul", "add", "sub"):
            fitting = [k for k in known if k[1] in (1, wide) or wide == 1]
            y, other = draw.choice(fitting)
            out = max(wide, other)
            squashed = [b("tanh", r, width=w) for r, w in ((x, wide), (y, other))]
            known.append((b(kind, *squashed, width=out), out))
        elif kind == "concat":
            y, other = draw.choice(known)
            known.append((b("concat", x, y, width=wide + other), wide + other))
        elif kind == "slice":
            start = draw.randrange(wide)
            known.append((b("slice", x, width=wide - start, constants=(start,)), wide - start))
        elif kind == "sum":
            known.append((b("scale", b("sum", x, width=1), width=1, constants=(1 / wide,)), 1))
        elif kind == "tensor":
            known.append((b("tensor", width=wide, tensors=(b.tensor(wide),)), wide))
        elif kind == "rows":
            known.append((b("rows", width=wide, tensors=(b.tensor(-1, wide),)), wide))
        else:
            known.append((b(kind, x, width=wide), wide))
    x = b("concat", *(register for register, _ in known[-4:]), width=sum(w for _, w in known[-4:]))
    last = b.linear(x, sum(w for _, w in known[-4:]), width)
    return b.done(b("sub", b("tanh", last, width=width), STATE, width=width))
