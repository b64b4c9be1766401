"""A program as the compiled kernels read it: where registers lie, what is fused, and where adjoints begin."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from neuralode.kernels.program import STATE, TIME, UNARY, Operation, Program

KINDS = (
    "linear", "copy", "sum", "tensor", "rows", "constant", "add", "sub", "mul", "div", "tanh", "sigmoid", "relu",
    "silu", "softplus", "elu", "leaky_relu", "gelu", "sin", "cos", "exp", "log", "sqrt", "abs", "reciprocal", "pow",
    "scale", "shift",
)  # fmt: skip
"""In the order of the kernels' own list (csrc/program.h)."""
FUSED = {"tanh", "sigmoid", "relu", "softplus", "elu"}
"""Functions whose derivative follows from their value, so that a linear layer need not keep what it gave them."""
_SET, _INCREASE, _LEAVE = range(3)


def _is_fused(op: Operation) -> bool:
    """Whether an operation may be done with the product before it: its value has to tell its slope."""
    tells = op.kind not in _TELLING or _TELLING[op.kind](op.constants)
    return op.kind in FUSED and tells


_TELLING: dict[str, Callable[[tuple[float, ...]], bool]] = {
    "elu": lambda constants: constants[0] >= 0,
    "softplus": lambda constants: constants[1] >= 20,  # from where on its value and its argument are the same
}


class Line(ctypes.Structure):
    """One operation."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "kind", "a", "b", "width_a", "width_b", "out", "width", "tensor", "bias", "activation",
            "adjoint_a", "adjoint_b",
        )
    ]  # fmt: skip


class Plan(NamedTuple):
    """A program laid out in a slot: features, a tile of rows each, one after the other."""

    slot: int
    """Features of a slot."""
    output: int
    time: int
    """Where the time lies; -1 if nothing reads it."""
    lines: ctypes.Array[Line]
    constants: ctypes.Array[ctypes.c_double]
    """Three a line."""
    cleared: ctypes.Array[ctypes.c_int32]
    """(start, features) of the adjoints that begin at zero."""


def make_plan(program: Program, wants_gradient: tuple[bool, ...], times_move: bool) -> Plan:
    """Lays a program out.

    Args:
        wants_gradient: which of its tensors do.
        times_move: whether the gradient with respect to the time is wanted.
    """
    return _Layout(program, wants_gradient, times_move).plan()


class _Layout:
    def __init__(self, program: Program, wants_gradient: tuple[bool, ...], times_move: bool):
        self.program, self.wants_gradient = program, wants_gradient
        self.widths = program.widths
        self.live = _live(program)
        self.uses = Counter(i for r in self.live if r > TIME for i in program.operations[r - 2].inputs)
        self.place: dict[int, int] = {STATE: 0}
        """Where each register lies."""
        self.owner: dict[int, int] = {STATE: STATE}
        """The register whose room a register lies in: its own, or the one that it is a slice of."""
        self.needed = {STATE: True}
        """Whether the adjoint of a register is of use."""
        self.slot = program.width
        self.time = -1
        if self.uses[TIME] or program.output == TIME:
            self.time = self._room(TIME, 1)
            self.needed[TIME] = times_move
        self.lines: list[tuple[Line, tuple[int, ...], int, tuple[float, ...]]] = []

    def plan(self) -> Plan:
        fused = self._fused()
        for i, op in enumerate(self.program.operations):
            register = i + 2
            if register not in self.live:
                continue
            if register in fused:  # the linear layer before it has its function
                self._alias(register, op.inputs[0], 0)
                continue
            self.needed[register] = any(self.needed[x] for x in op.inputs) or any(
                self.wants_gradient[x] for x in op.tensors
            )
            if op.kind == "slice":
                self._alias(register, op.inputs[0], int(op.constants[0]))
                continue
            self._room(register, op.width)
            self._write(register, op, fused)
        cleared = self._mark_adjoints()
        constants = [c for *_, given in self.lines for c in (*given, 0.0, 0.0, 0.0)[:3]]
        return Plan(
            self.slot, self.place[self.program.output], self.time,
            (Line * len(self.lines))(*(line for line, *_ in self.lines)),
            (ctypes.c_double * len(constants))(*constants),
            (ctypes.c_int32 * len(cleared))(*cleared),
        )  # fmt: skip

    def _fused(self) -> dict[int, Operation]:
        """Registers that are a function of a linear layer which nothing else reads, with their operations."""
        found = {}
        for i, op in enumerate(self.program.operations):
            if _is_fused(op) and op.inputs[0] > TIME and i + 2 in self.live:
                source = self.program.operations[op.inputs[0] - 2]
                alone = self.uses[op.inputs[0]] == 1 and op.inputs[0] != self.program.output
                if source.kind == "linear" and alone:
                    found[i + 2] = op
        return found

    def _room(self, register: int, width: int) -> int:
        self.place[register], self.owner[register] = self.slot, register
        self.slot += width
        return self.place[register]

    def _alias(self, register: int, source: int, start: int) -> None:
        self.place[register] = self.place[source] + start
        self.owner[register] = self.owner[source]
        self.needed[register] = self.needed[source]

    def _write(self, register: int, op: Operation, fused: dict[int, Operation]) -> None:
        if op.kind == "concat":
            start = self.place[register]
            for source in op.inputs:
                width = self.widths[source]
                self._line("copy", (source,), register, start, width)
                start += width
            return
        activation = next((f for f in fused.values() if f.inputs[0] == register), None)
        tensor = op.tensors[0] if op.tensors else -1
        bias = op.tensors[1] if len(op.tensors) > 1 else -1
        constants = op.constants if activation is None else activation.constants
        self._line(op.kind, op.inputs, register, self.place[register], op.width, tensor, bias, activation, constants)

    def _line(
        self, kind: str, inputs: tuple[int, ...], register: int, out: int, width: int, tensor: int = -1,
        bias: int = -1, activation: Operation | None = None, constants: tuple[float, ...] = (),
    ) -> None:  # fmt: skip
        first = inputs[0] if inputs else STATE
        second = inputs[1] if len(inputs) > 1 else first
        line = Line(
            KINDS.index(kind), self.place[first], self.place[second], self.widths[first], self.widths[second], out,
            width, tensor, bias, -1 if activation is None else KINDS.index(activation.kind), _LEAVE, _LEAVE,
        )  # fmt: skip
        self.lines.append((line, inputs, register, constants))

    def _mark_adjoints(self) -> list[int]:
        """Sets which inputs' adjoints a line sets, and which it adds to; the rooms that have to begin at zero."""
        # a room of which parts are read would be set in parts, so it begins at zero
        parted = {self.owner[i] for i in self.place if self.place[i] != self.place[self.owner[i]]}
        parted |= {
            self.owner[i + 2] for i, op in enumerate(self.program.operations)
            if i + 2 in self.live and op.kind == "slice" and op.width < self.widths[self.owner[i + 2]]
        }  # fmt: skip
        begun = set(parted) | {self.owner[self.program.output]}
        for line, inputs, _, _ in reversed(self.lines):
            for name, source in zip(("adjoint_a", "adjoint_b"), inputs, strict=False):
                if self.needed[source]:
                    owner = self.owner[source]
                    setattr(line, name, _INCREASE if owner in begun else _SET)
                    begun.add(owner)
        never = {register for register in (STATE, TIME) if register in self.place and register not in begun}
        return [x for owner in sorted(parted | never) for x in (self.place[owner], self.widths[owner])]


def _live(program: Program) -> set[int]:
    """The registers that the output depends on."""
    live = {program.output}
    for i in range(len(program.operations) - 1, -1, -1):
        if i + 2 in live:
            live.update(program.operations[i].inputs)
    return live


assert set(UNARY) <= set(KINDS)
