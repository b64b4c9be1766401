"""Numbers that tell whether a field counts with them only: what it decides by a count, a program would not do."""

from __future__ import annotations

from typing import Any

_NOT_LOOKED_AT_BY = frozenset({
    "__add__", "__radd__", "__new__", "__init__", "__getattribute__", "__setattr__", "__delattr__", "__init_subclass__",
    "__subclasshook__", "__class__", "__dir__", "__sizeof__",
})  # fmt: skip


def tally_of(number: int | float) -> Any:
    """A number of the same value; `was_read` says later whether more was done with it than adding one."""
    tally = TALLIES[type(number)](number)
    tally.reads = []
    return tally


def was_read(number: Any) -> bool:
    """Whether anything was made of a tally, or of a number that came of it by adding one, besides such a sum."""
    return bool(getattr(number, "reads", ()))


def rose_by_one(before: Any, now: Any) -> bool:
    """Whether a number, or a tally, is one more than it was."""
    kind: Any = next((base for base, tally in TALLIES.items() if type(before) in (base, tally)), None)
    if kind is None or type(now) is not type(before):
        return False
    return bool(kind.__sub__(now, before) == 1)  # as plain numbers subtract: a tally would notice


def _tally(base: type) -> type:
    def noticing(name: str) -> Any:
        method = getattr(base, name)

        def read(self: Any, *args: Any) -> Any:
            self.reads.append(name)
            return method(self, *args)

        return read

    def add(self: Any, other: Any) -> Any:
        if type(other) not in TALLIES or other != 1:
            return noticed_sum(self, other)
        total = TALLIES[base](base.__add__(self, other))  # type: ignore[operator]
        total.reads = self.reads
        return total

    noticed_sum = noticing("__add__")
    names = [name for name in dir(base) if callable(getattr(base, name)) and name not in _NOT_LOOKED_AT_BY]
    return type(f"Tally_{base.__name__}", (base,), {**{n: noticing(n) for n in names}, "__add__": add, "__radd__": add})


TALLIES: dict[type, type] = {}
"""The kinds of numbers that count evaluations, and their tallies."""
TALLIES.update({base: _tally(base) for base in (int, float)})
