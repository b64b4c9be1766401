"""What a field is to the kernels: a program, a short list of operations on the rows of a state.

A row is one sample's state. A program works on all rows alike and lets no row see another, so that a kernel may run it
a tile of rows at a time. Plain PyTorch evaluates it here: the readable truth that the compiled kernels have to agree
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

Function = Callable[..., torch.Tensor]

UNARY: dict[str, Function] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "softplus": lambda x, beta, threshold: F.softplus(x, beta, threshold),
    "elu": lambda x, alpha: F.elu(x, alpha),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "gelu": F.gelu,
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "pow": lambda x, exponent: x**exponent,
    "scale": lambda x, factor: x * factor,
    "shift": lambda x, offset: x + offset,
}
"""Element-wise functions of a register and of constants."""

BINARY: dict[str, Function] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
"""Element-wise functions of two registers, of one width, or one of them of width 1."""

STATE, TIME = 0, 1
"""The registers that a program begins with: the state [B, D] and the time [B, 1]."""


@dataclass(frozen=True)
class Operation:
    """One line of a program: a register [B, width] made of earlier ones, of tensors and of constants.

    Kinds besides the names in UNARY and BINARY:
        linear: x Wᵀ (+ b), tensors being W [width, width of x] and, if it has one, b [width].
        concat: registers side by side.
        slice: `width` features from the one that the constant says.
        sum: the features of each row, summed.
        tensor: a tensor of shape [width], the same for every row.
        rows: a tensor of shape [B, width], each row its own.
        constant: a number for all.
    """

    kind: str
    inputs: tuple[int, ...]
    width: int
    tensors: tuple[int, ...] = ()
    """Indices into the tensors that come with a program."""
    constants: tuple[float, ...] = ()


@dataclass(frozen=True)
class Program:
    """A vector field dy/dt = f(t, y) of rows. Tensors, such as weights, are not part of it: they come with a call."""

    width: int
    """D, the features of a row of the state."""
    operations: tuple[Operation, ...]
    """Operation i writes register i + 2, after STATE and TIME."""
    output: int
    """The register that is dy/dt, [B, D]."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the tensors; the first entry is -1 for those that have one row a sample."""

    def __post_init__(self) -> None:
        # programs are keys of what is made for them, in every solve
        object.__setattr__(self, "_hash", hash((self.width, self.operations, self.output, self.shapes)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def widths(self) -> list[int]:
        """Features of every register."""
        return [self.width, 1, *(op.width for op in self.operations)]

    def __call__(self, t: torch.Tensor, y: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """dy/dt, [B, D], for a state y [B, D] and a time t, [] or [B, 1]. Differentiable."""
        rows = len(y)
        registers = [y, t.to(y.dtype).expand(rows, 1)]
        for op in self.operations:
            xs, given = [registers[i] for i in op.inputs], [tensors[i] for i in op.tensors]
            registers.append(_apply(op, xs, given, y))
        return registers[self.output]


def _apply(op: Operation, xs: list[torch.Tensor], given: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    rows = len(y)
    if op.kind == "linear":
        return F.linear(xs[0], *given)
    if op.kind == "concat":
        return torch.cat(xs, dim=1)
    if op.kind == "slice":
        return xs[0].narrow(1, int(op.constants[0]), op.width)
    if op.kind == "sum":
        return xs[0].sum(1, keepdim=True)
    if op.kind in ("tensor", "rows"):
        return given[0].expand(rows, op.width)
    if op.kind == "constant":
        return y.new_full((rows, op.width), op.constants[0])
    if op.kind in BINARY:
        return BINARY[op.kind](*xs)
    return UNARY[op.kind](xs[0], *op.constants)


def operation_count(program: Program) -> float:
    """Floating-point operations of one evaluation for one row, a transcendental function counted as one."""
    return math.fsum(
        2 * math.prod(program.shapes[op.tensors[0]]) if op.kind == "linear" else op.width for op in program.operations
    )
