"""The source of the kernels for one program, one method and one kind of steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from neuralode.kernels.plan import KINDS, Line, Plan, make_plan
from neuralode.kernels.program import Program
from neuralode.kernels.task import BETWEEN, MethodData

STEPS = ("GIVEN", "SHARED", "OWN")
"""Whether steps are given, chosen for all samples together, or for each sample."""
_MOST_SUMS = 32
"""Gradients of tensors that a thread can hold in registers, and features of its registers."""
_MOST_FEATURES = 48


@dataclass(frozen=True)
class Variant:
    """What kernels are specialised to."""

    program: Program
    wants_gradient: tuple[bool, ...]
    method: MethodData
    steps: str
    groups: tuple[int, ...]
    dtype: torch.dtype
    keep_stages: bool = True
    shared_limit: int = 99 * 1024
    """Bytes that the threads of a block may share."""
    times_move: bool = False
    """Whether the times want a gradient."""


class Memory(NamedTuple):
    """Where what a kernel works on lies."""

    fits: dict[str, bool]
    """Whether a part lies in the memory that a block's threads share."""
    shared: int
    """Bytes of it that a block needs."""
    overflow: int
    """Bytes a block of what does not fit."""


def _bytes(n: int) -> int:
    return (n + 31) // 32 * 32


def _padded(n: int) -> int:
    return (n + 3) // 4 * 4


class Layout:
    """Where the tensors of a program lie, and the shape of blocks."""

    def __init__(self, variant: Variant):
        self.variant = variant
        self.plan: Plan = make_plan(variant.program, variant.wants_gradient, variant.times_move)
        self.width = variant.program.width
        self.forward: dict[int, int] = {}
        """Where each tensor begins; a weight for the forward product."""
        self.reverse: dict[int, int] = {}
        """Where each weight begins again, for the reverse."""
        self.rows: dict[int, int] = {}
        """Where each tensor that has one row a sample begins among their features."""
        self.sums: dict[int, int] = {}
        """Where each tensor's gradient begins."""
        self.tensors_forward, self.tensors, self.row_features, self.sum_count = self._place()
        self.tiled = self._tiled()
        widest = max(line.width for line in self.plan.lines) if len(self.plan.lines) else 1
        self.warps = (4 if widest <= 64 else 8) if self.tiled else 4
        self.threads = 32 * self.warps
        self.rows_of_block = 32 if self.tiled else self.threads

    def is_weight(self, i: int) -> bool:
        return any(op.kind == "linear" and op.tensors[0] == i for op in self.variant.program.operations)

    def shape(self, i: int) -> tuple[int, int]:
        """(outputs, inputs) of a weight."""
        outputs, inputs = self.variant.program.shapes[i]
        return outputs, inputs

    def size(self, i: int) -> int:
        """Entries of a tensor, of one row where it has one a sample."""
        shape = self.variant.program.shapes[i]
        return math.prod(shape[1:] if shape and shape[0] == -1 else shape)

    def _place(self) -> tuple[int, int, int, int]:
        at = rows = sums = 0
        shapes = self.variant.program.shapes
        own = [bool(shape) and shape[0] == -1 for shape in shapes]
        for i in range(len(shapes)):
            if own[i]:
                self.rows[i] = rows
                rows += self.size(i)
                continue
            self.forward[i] = at
            outputs, inputs = self.shape(i) if self.is_weight(i) else (self.size(i), 1)
            at += inputs * _padded(outputs)
            if self.variant.wants_gradient and self.variant.wants_gradient[i]:
                self.sums[i] = sums
                sums += self.size(i)
        forward = at
        for i in self.forward:
            if self.is_weight(i):
                outputs, inputs = self.shape(i)
                self.reverse[i] = at
                at += outputs * _padded(inputs)
        return forward, at, rows, sums

    def _tiled(self) -> bool:
        """Whether a tile of rows is shared by a block: a thread has no registers for a wide field."""
        return self.plan.slot > _MOST_FEATURES or self.sum_count > _MOST_SUMS or self.tensors_forward > 256

    # --- memory that the threads of a block share -----------------------------------------------------------------

    def _rooms(self, backward: bool) -> list[tuple[str, int]]:
        """(name, features of a tile) of what a kernel works on, what is used most first."""
        stages = len(self.variant.method.c)
        slopes = stages if self.variant.method.fsal else stages + 1
        w, slot = self.width, self.plan.slot
        if not backward:
            return [("slot", slot), ("y", w), ("k", slopes * w), ("y1", w)]
        again = 0 if self.variant.keep_stages else (slopes - 1) * w
        return [("slot", slot), ("registers", slot), ("ends", 4 * w), ("k", slopes * w),
                ("row_sums", self.row_features), ("u", again), ("values", again)]  # fmt: skip

    def memory(self, backward: bool) -> Memory:
        """What lies in shared memory: as much as fits, in the order of use."""
        item = self.variant.dtype.itemsize
        used, overflow, fits = self.threads * 8 + 32, 0, {}
        for name, features in self._rooms(backward):
            size = _bytes(features * 36 * item) if self.tiled else 0
            fits[name] = used + size <= self.variant.shared_limit
            used, overflow = (used + size, overflow) if fits[name] else (used, overflow + size)
        for name, count in (
            ("tensors", self.tensors if backward else self.tensors_forward),
            ("sums", self.sum_count if backward and self.tiled else 0),
        ):
            size = _bytes(count * item)
            fits[name] = used + size <= self.variant.shared_limit
            used += size if fits[name] else 0
        return Memory(fits, used, overflow)

    # --- packing --------------------------------------------------------------------------------------------------

    def pack(self, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """The tensors as the kernels read them, one after the other."""
        packed = like.new_zeros(max(1, self.tensors))
        for i, start in self.forward.items():
            if self.is_weight(i):
                outputs, inputs = self.shape(i)
                _view(packed, start, inputs, outputs).copy_(tensors[i].t())
                _view(packed, self.reverse[i], outputs, inputs).copy_(tensors[i])
            else:
                packed[start : start + self.size(i)] = tensors[i].reshape(-1)
        return packed

    def pack_rows(self, tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Tensors that have one row a sample, side by side."""
        parts = [tensors[i].reshape(len(like), -1) for i in self.rows]
        return torch.cat(parts, dim=1).contiguous() if parts else like.new_zeros(1)


def _view(packed: torch.Tensor, start: int, rows: int, columns: int) -> torch.Tensor:
    stride = _padded(columns)
    return packed[start : start + rows * stride].view(rows, stride)[:, :columns]


@functools.lru_cache(maxsize=256)
def layout_of(variant: Variant) -> Layout:
    return Layout(variant)


@functools.lru_cache(maxsize=256)
def write_source(variant: Variant, backward: bool) -> str:
    """The source of the kernel of one direction."""
    layout = layout_of(variant)
    memory = layout.memory(backward)
    method, plan = variant.method, layout.plan
    stages = len(method.c)
    inner = stages - 1 if method.fsal else stages
    square = [[*row, *[0.0] * (stages - len(row))][:inner] for row in method.a[:inner]]
    parts = max(variant.groups) + 1
    sizes = [variant.groups.count(part) for part in range(parts)]
    numbers = {
        "WIDTH": layout.width, "SLOT": plan.slot, "OUTPUT": plan.output, "TIME": plan.time, "STAGES": stages,
        "INNER": inner, "ORDER": method.order, "ERROR_ORDER": method.error_order, "GROUPS": parts,
        "DEGREE": len(method.interpolant[0]) if method.interpolant else 1,
        "TENSORS": layout.tensors if backward else layout.tensors_forward, "SUMS": layout.sum_count,
        "OWN_ROWS": layout.row_features, "STEPS": STEPS.index(variant.steps), "BETWEEN": BETWEEN.index(method.between),
    }  # fmt: skip
    flags = {
        "FSAL": method.fsal, "LANDS": method.lands, "HAS_LOW": bool(method.error_low),
        "KEEP_STAGES": variant.keep_stages, "TIMES_MOVE": variant.times_move, "SHARED_TENSORS": memory.fits["tensors"],
        "SHARED_SUMS": memory.fits["sums"], **{f"FITS_{name}": fits for name, fits in memory.fits.items()},
    }  # fmt: skip
    tables = [
        table("double", "c", method.c), table("T", "a", square), table("T", "b", method.b),
        table("T", "error", method.error or [0.0] * stages),
        table("T", "error_low", method.error_low or [0.0] * stages),
        table("double", "interpolant", method.interpolant or [[0.0]] * stages),
        table("int", "group", variant.groups), table("int", "group_size", sizes),
    ]  # fmt: skip
    names = {"WARPS": layout.warps if layout.tiled else 1, "THREADS": layout.threads, "OVERFLOW": memory.overflow}
    return "\n".join([
        f"typedef {'double' if variant.dtype == torch.float64 else 'float'} T;",
        f"#define TILED {int(layout.tiled)}",
        f"#define STAGE_LOOP _Pragma(\"unroll{' 1' if layout.tiled else ''}\")",
        '#include "device.h"',
        "namespace neuralode {",
        *(f"constexpr int {name} = {value};" for name, value in (numbers | names).items()),
        *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
        *tables,
        "}",
        '#include "lines.cuh"',
        "namespace neuralode {",
        "DEVICE void evaluate(const Given& given, T* slot) {",
        *(f"    {_forward(layout, i)}" for i in range(len(plan.lines))),
        "}",
        *(_reverse_functions(layout) if backward else []),
        "}",
        f'#include "{"backward" if backward else "forward"}.cuh"',
        "",
    ])  # fmt: skip


def _reverse_functions(layout: Layout) -> list[str]:
    plan = layout.plan
    cleared = [(plan.cleared[i], plan.cleared[i + 1]) for i in range(0, len(plan.cleared), 2)]
    return [
        "DEVICE void clear_adjoints(T* registers) {",
        *(f"    clear<{n}>(registers + {start} * PITCH);" for start, n in cleared),
        "}",
        "DEVICE void reverse(const Given& given, const T* slot, T* registers) {",
        *(f"    {_reverse(layout, i)}" for i in reversed(range(len(plan.lines)))),
        "}",
    ]


def _number(x: float) -> str:
    return {math.inf: "INFINITY", -math.inf: "-INFINITY"}.get(x, repr(float(x)))


def table(kind: str, name: str, values: Sequence[object]) -> str:
    def text(value: object) -> str:
        if isinstance(value, list | tuple):
            return "{" + ", ".join(text(v) for v in value) + "}"
        return str(value) if kind == "int" else f"{kind}({_number(float(str(value)))})"

    first = values[0]
    inner = f"[{len(first)}]" if isinstance(first, list | tuple) else ""
    return f"TABLE {kind} {name}[{len(values)}]{inner} = {text(list(values))};"


def _constants(plan: Plan, i: int) -> str:
    return ", ".join(f"T({_number(plan.constants[3 * i + n])})" for n in range(2))


def _register(room: str, start: int) -> str:
    return f"{room} + {start} * PITCH"


def _forward(layout: Layout, i: int) -> str:
    line: Line = layout.plan.lines[i]
    kind, constants = KINDS[line.kind], _constants(layout.plan, i)
    a, b, out = (_register("slot", start) for start in (line.a, line.b, line.out))
    if kind == "linear":
        bias = f"given.tensors + {layout.forward[line.bias]}" if line.bias >= 0 else "(const T*)nullptr"
        weight = f"given.tensors + {layout.forward[line.tensor]}"
        return f"linear<{line.width_a}, {line.width}, {line.activation}>({weight}, {bias}, {a}, {out}, {constants});"
    if kind == "copy":
        return f"copy<{line.width}>({a}, {out});"
    if kind == "sum":
        return f"sum<{line.width_a}>({a}, {out});"
    if kind == "tensor":
        return f"tensor<{line.width}>(given.tensors + {layout.forward[line.tensor]}, {out});"
    if kind == "rows":
        return f"tensor<{line.width}>(given.rows + {layout.rows[line.tensor]}, {out});"
    if kind == "constant":
        return f"constant<{line.width}>(T({_number(layout.plan.constants[3 * i])}), {out});"
    if kind in ("add", "sub", "mul", "div"):
        return f"binary<{kind.upper()}, {line.width}, {line.width_a}, {line.width_b}>({a}, {b}, {out});"
    return f"unary<{kind.upper()}, {line.width}>({a}, {out}, {constants});"


def _reverse(layout: Layout, i: int) -> str:
    line: Line = layout.plan.lines[i]
    kind, constants = KINDS[line.kind], _constants(layout.plan, i)
    a, b, out = (_register("slot", start) for start in (line.a, line.b, line.out))
    to_a, to_b, g = (_register("registers", start) for start in (line.a, line.b, line.out))
    if kind == "linear":
        weight = f"given.tensors + {layout.reverse[line.tensor]}"
        sums = [f"given.sums + {layout.sums[t]}" if t in layout.sums else "nullptr" for t in (line.tensor, line.bias)]
        return (f"reverse_linear<{line.width_a}, {line.width}, {line.activation}, {line.adjoint_a}>"
                f"({weight}, {a}, {out}, {g}, {to_a}, {', '.join(sums)}, {constants});")  # fmt: skip
    if kind == "copy":
        return f"reverse_copy<{line.width}, {line.adjoint_a}>({g}, {to_a});"
    if kind == "sum":
        return f"reverse_sum<{line.width_a}, {line.adjoint_a}>({g}, {to_a});"
    if kind == "tensor":
        start = layout.sums.get(line.tensor)
        return "" if start is None else f"add_rows<{line.width}>({g}, given.sums + {start}), meet_rows();"
    if kind == "rows":
        if not layout.variant.wants_gradient[line.tensor]:
            return ""
        return f"add_own<{line.width}>({g}, given.row_sums + {layout.rows[line.tensor]} * PITCH);"
    if kind == "constant":
        return ""
    if kind in ("add", "sub", "mul", "div"):
        wide = f"{line.width}, {line.width_a}, {line.width_b}"
        return (f"reverse_binary<{kind.upper()}, {wide}, {line.adjoint_a}, {line.adjoint_b}>"
                f"({a}, {b}, {out}, {g}, {to_a}, {to_b});")  # fmt: skip
    return f"reverse_unary<{kind.upper()}, {line.width}, {line.adjoint_a}>({a}, {out}, {g}, {to_a}, {constants});"
