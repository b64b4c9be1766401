"""What the tensors of a watched evaluation are to its program: rows in registers, constants, or numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from neuralode.kernels.program import TIME, Operation, Program


class NotLowered(Exception):
    """A field is no program; the message says what stopped it."""


class Row(NamedTuple):
    """A tensor that has a value in each row: features of what is in a root's register."""

    root: int
    start: int
    width: int
    squeezed: bool
    """Whether the tensor has no dimension for the features."""
    uniform: bool
    """Whether the tensor has no dimensions for the rows: they are all alike."""


class Made(NamedTuple):
    """An operation on constants alone."""

    func: Any
    args: Any
    kwargs: Any
    out: Any


Key = tuple[int, torch.Size, tuple[int, ...]]


class Writer:
    """Writes a program while an evaluation goes on.

    A tensor is known by the memory that it covers, for views reach an operation as tensors of their own. Memory is not
    used twice, since all tensors are kept until the program is done.

    Args:
        grad: whether the evaluation builds a graph.
        guess: what the only dimension of a tensor holds, "rows" or "features", where there are as many of both.
    """

    def __init__(self, grad: bool, guess: str = "rows"):
        self.grad, self.guess, self.refusal = grad, guess, ""
        self.guessed = False
        self.lead: tuple[int, ...] = ()
        """Dimensions of the rows."""
        self.width = 0
        self.dtype = torch.float32
        self.operations: list[Operation] = []
        self.tensors: list[torch.Tensor] = []
        self.made: list[Made] = []
        """The operations on constants, in order."""
        self.with_history: list[Made] = []
        """Those among them through which a gradient has to pass."""
        self.sources: list[torch.Tensor] = []
        """The tensors as the evaluation had them, before they got their shapes."""
        self.shapes: list[tuple[int, ...]] = []
        self._rows: dict[Key, Row] = {}
        self._fills: dict[Key, float] = {}
        """Tensors that hold one number everywhere, and the number."""
        self._registers: dict[int, int] = {}
        """The register that holds a root now: assignments in place change it."""
        self._fixed: set[int] = set()
        self._kept: list[Any] = []
        self._given: dict[Any, int] = {}
        self.transposed: dict[Key, torch.Tensor] = {}
        """Constant matrices, by their transposes."""
        self.to_transpose: list[int] = []
        self._next_root = TIME + 1
        self._graphs: set[int] = set()
        """Roots that belong to a graph of autograd."""

    @property
    def count(self) -> int:
        """The number of rows."""
        return math.prod(self.lead)

    # --- what tensors are -----------------------------------------------------------------------------------------

    def begin_with(self, x: torch.Tensor, row: Row) -> None:
        """Notes a tensor that the evaluation is given: its root is the register of that number, and stays."""
        self._registers[row.root] = row.root
        self._fixed.add(row.root)
        if x.requires_grad:
            self._graphs.add(row.root)
        self.know(x, row)

    def know(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """Notes what a tensor is, a view of a root; gives the tensor back."""
        self._rows[key_of(x)] = row
        self._kept.append(x)
        return x

    def result(self, x: torch.Tensor, register: int, squeezed: bool, sources: Any = ()) -> torch.Tensor:
        """Notes a new tensor, which is in a register and was made of others; gives it back."""
        root = self._next_root
        self._next_root += 1
        self._registers[root] = register
        if self.grad and any(isinstance(s, torch.Tensor) and s.requires_grad for s in sources):
            self._graphs.add(root)
        uniform = self.rows_of(x.shape, squeezed) == 1
        return self.know(x, Row(root, 0, self.width_of(register), squeezed, uniform))

    def filled(self, x: torch.Tensor, value: float) -> torch.Tensor:
        """Notes a new tensor of one number: with rows if its shape has them, so that it may be written to."""
        shape = tuple(x.shape)
        doubtful = shape == self.lead == (self.width,)  # rows, or features?
        if shape == self.lead and shape and not doubtful and x.dtype == self.dtype:
            return self.result(x, self.constant(value, 1), squeezed=True)
        if len(shape) > 1 and math.prod(shape[:-1]) == self.count and x.dtype == self.dtype:
            return self.result(x, self.constant(value, shape[-1]), squeezed=False)
        if len(shape) == 1 and not self.lead and x.dtype == self.dtype:
            return self.result(x, self.constant(value, shape[0]), squeezed=False)
        self._fills[key_of(x)] = value
        self._kept.append(x)
        return x

    def fix(self, x: torch.Tensor) -> None:
        """Notes that a tensor's memory is known by several roots, so that it must not change from here on."""
        row = self._rows.get(key_of(x))
        if row is not None:
            self._fixed.add(row.root)

    def keep(self, x: Any) -> None:
        """Keeps a constant's memory from being used again."""
        self._kept.append(x)

    def row(self, x: Any, new: bool = False) -> Row | None:
        """What a tensor is, if it has a value in each row; `new` if autograd has not seen it yet."""
        if not isinstance(x, torch.Tensor):
            return None
        row = self._rows.get(key_of(x))
        if row is not None and not new and row.root in self._graphs and not x.requires_grad:
            raise NotLowered("it detaches a value")
        return row

    def fill(self, x: Any) -> float | None:
        """The number that a tensor holds everywhere, if it is known to."""
        return self._fills.get(key_of(x)) if isinstance(x, torch.Tensor) else None

    def touches(self, args: Any, kwargs: Any, or_gradients: bool = False) -> bool:
        """Whether a row value is among the arguments of an operation, or a tensor that wants a gradient."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor):
                if key_of(x) in self._rows or (or_gradients and x.requires_grad):
                    return True
            elif isinstance(x, list | tuple) and self.touches(x, {}, or_gradients):
                return True
        return False

    def guess_squeezed(self, shape: torch.Size) -> bool:
        """Whether a tensor made of the time and of constants has rows only: its shape allows no more than a guess."""
        if tuple(shape) != self.lead or not self.lead:
            return False
        self.guessed = True
        return self.guess == "rows"

    def rows_of(self, shape: torch.Size, squeezed: bool) -> int:
        """How many rows a tensor of that shape has."""
        return math.prod(shape if squeezed else shape[:-1])

    def loss(self) -> str:
        """Where a gradient does not pass that should, as below autograd, where PyTorch resolves conjugates."""
        for func, _args, _kwargs, out in self.with_history:
            made = [x for x in flat(out) if x.is_floating_point() or x.is_complex()]
            if made and not func.is_view and not any(x.requires_grad for x in made):  # a view is another later
                return f"{func} is done where autograd does not see it"
        return ""

    # --- what is written ------------------------------------------------------------------------------------------

    def emit(self, kind: str, *inputs: int, width: int, tensors: tuple[int, ...] = (),
             constants: tuple[float, ...] = ()) -> int:  # fmt: skip
        """Writes an operation; its register."""
        if width == 0:
            raise NotLowered("a part of it has no features")
        if (kind == "scale" and constants[0] == 1) or (kind == "shift" and constants[0] == 0):
            return inputs[0]
        self.operations.append(Operation(kind, inputs, width, tensors, constants))
        return len(self.operations) + 1

    def register(self, row: Row) -> int:
        """The register that holds a row value as it is now."""
        whole = self._registers[row.root]
        if row.width == self.width_of(whole):
            return whole
        return self._once(("slice", whole, row.start, row.width), "slice", whole, width=row.width,
                          constants=(float(row.start),))  # fmt: skip

    def constant(self, value: float, width: int) -> int:
        return self._once(("constant", value, width), "constant", width=width, constants=(value,))

    def widened(self, register: int, width: int, wanted: int) -> int:
        """A register of the wanted width, from one that may have width 1."""
        if width == wanted:
            return register
        if width != 1:
            raise NotLowered(f"a value has {width} features where {wanted} are expected")
        return self.emit("add", register, self.constant(0.0, wanted), width=wanted)

    def operand(self, x: Any, shape: torch.Size, squeezed: bool) -> tuple[int, int]:
        """An argument of an element-wise operation whose result has that shape: its register and width.

        The result's last dimension is the features unless it is squeezed, and all others are the rows. An argument has
        to have the same, or ones, in both.
        """
        if isinstance(x, int | float):
            return self.constant(float(x), 1), 1
        fill = self.fill(x)
        if fill is not None:
            return self.constant(fill, 1), 1
        row = self.row(x)
        if row is not None:
            self._check_alignment(row, x.shape, shape, squeezed)
            return self.register(row), row.width
        if x.dtype != self.dtype:
            raise NotLowered(f"it mixes {x.dtype} with the state's {self.dtype}")
        padded = (*[1] * (len(shape) - x.dim()), *x.shape)
        lead, last = (padded, 1) if squeezed else (padded[:-1], padded[-1] if padded else 1)
        if math.prod(lead) == 1:
            index = self.tensor(x, (last,))
            return self._once(("tensor", index), "tensor", width=last, tensors=(index,)), last
        if tuple(lead) == tuple(shape if squeezed else shape[:-1]) and math.prod(lead) == self.count:
            index = self.tensor(x, (-1, last))
            return self._once(("rows", index), "rows", width=last, tensors=(index,)), last
        raise NotLowered(f"a tensor of shape {tuple(x.shape)} does not fit the rows")

    def _check_alignment(self, row: Row, own: torch.Size, shape: torch.Size, squeezed: bool) -> None:
        padded = (*[1] * (len(shape) - len(own)), *own)
        lead = padded if squeezed else padded[:-1]
        wanted = tuple(shape) if squeezed else tuple(shape[:-1])
        features_fit = row.width == 1 if squeezed or row.squeezed else row.width == padded[-1]
        if row.uniform and math.prod(lead) == 1 and features_fit:
            return
        # rows against rows, and features against features
        if lead != wanted or not features_fit or len(own) != len(shape) or row.squeezed != squeezed:
            raise NotLowered(f"a value of shape {tuple(own)} is spread over rows of shape {tuple(shape)}")

    def tensor(self, x: torch.Tensor, shape: tuple[int, ...], transposed: bool = False) -> int:
        """The index of a constant, or its transpose, among the program's tensors, in that shape; -1 is for the rows."""
        key = (id(x), shape, transposed)  # not its memory: autograd may know two histories of that
        if key not in self._given:
            if x.dtype != self.dtype:
                raise NotLowered(f"it mixes {x.dtype} with the state's {self.dtype}")
            self._kept.append(x)
            self.tensors.append(x)
            self.shapes.append(shape)
            self._given[key] = len(self.tensors) - 1
            if transposed:
                self.to_transpose.append(len(self.tensors) - 1)
        return self._given[key]

    def assign(self, x: torch.Tensor, register: int, width: int, sources: Any) -> None:
        """Writes to the memory that a tensor covers, as an operation in place does."""
        row = self._rows.get(key_of(x))
        if row is None or row.root in self._fixed:
            raise NotLowered("it changes in place what it was given, or what it has spread")
        if self.grad and any(isinstance(s, torch.Tensor) and s.requires_grad for s in sources):
            self._graphs.add(row.root)
        register = self.widened(register, width, row.width)
        whole = self._registers[row.root]
        size = self.width_of(whole)
        if row.width != size:
            end = row.start + row.width
            before = [self._slice(whole, 0, row.start)] if row.start else []
            after = [self._slice(whole, end, size - end)] if end < size else []
            register = self.emit("concat", *before, register, *after, width=size)
        self._registers[row.root] = register

    def program(self, output: int) -> Program:
        """What was written; its tensors get their shapes here, for autograd does not see what the writer does."""
        self.sources = list(self.tensors)
        for i in self.to_transpose:
            self.tensors[i] = self.tensors[i].t()
        for i, shape in enumerate(self.shapes):
            wanted = tuple(self.count if n == -1 else n for n in shape)
            if self.tensors[i].shape != wanted:
                self.tensors[i] = self.tensors[i].reshape(wanted)
        return Program(self.width, tuple(self.operations), output, tuple(self.shapes))

    def _slice(self, register: int, start: int, width: int) -> int:
        return self.emit("slice", register, width=width, constants=(float(start),))

    def width_of(self, register: int) -> int:
        """Features of a register."""
        if register > TIME:
            return self.operations[register - 2].width
        return 1 if register == TIME else self.width

    def _once(self, key: Any, kind: str, *inputs: int, **details: Any) -> int:
        """The register of an operation that is written once only."""
        if key not in self._given:
            self._given[key] = self.emit(kind, *inputs, **details)
        return self._given[key]


def flat(x: Any) -> list[torch.Tensor]:
    """The tensors of an argument, or of a result."""
    return [y for y in (x if isinstance(x, list | tuple) else (x,)) if isinstance(y, torch.Tensor)]


def key_of(x: torch.Tensor) -> Key:
    """The memory that a tensor covers."""
    return x.data_ptr(), x.shape, x.stride()
