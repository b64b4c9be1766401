"""Where a field may keep values: each place is read before a call of it and after, and can be put back."""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import types
import weakref
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
from torch import nn

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"_buffers"}
"""Attributes by which PyTorch itself keeps a module; parameters and hooks are looked at otherwise."""
_HELD_BY_MODULES = frozenset(nn.Module().__dict__)
LARGE = 256
"""Entries of a container beyond which they are compared as a whole, and not looked into."""
MISSING = object()
_NOT_OF_A_CALL = frozenset({
    "__init__", "__new__", "__del__", "__repr__", "__str__", "__getstate__", "__setstate__", "__reduce__",
    "__init_subclass__", "__post_init__",
})  # fmt: skip
"""Methods by which objects come, go and are shown."""


class Place:
    """Named values that a call may change."""

    counts = True
    """Whether numbers among them may be counters."""
    grows = False
    """Whether names may be added to them."""

    def __init__(self, before: dict[Any, Any], holder: Sized = ()):
        self.before, self.holder, self.count = before, holder, len(holder)

    def read(self, name: Any) -> Any: ...

    def write(self, name: Any, value: Any) -> None: ...

    def added(self) -> Any:
        """A name that was not there before, if there is one; a removed one is among those that were."""
        return None

    def is_of(self, thing: Any) -> bool:
        """Whether these are the attributes of an object."""
        return False

    def restore(self) -> None:
        """Puts back what was there."""
        for name, value in self.before.items():
            if self.read(name) is not value:
                self.write(name, value)

    def describe(self, name: Any) -> str:
        return f"a call changes {name!r}"


class Attributes(Place):
    grows = True

    def __init__(self, owner: Any):
        # a program that is kept for a module does not keep the module
        self._owner = weakref.ref(owner) if isinstance(owner, nn.Module) else lambda: owner
        own = owner.__dict__
        before = (
            {name: own[name] for name in own if name not in _OF_EVERY_MODULE}
            if isinstance(owner, nn.Module)
            else {**own}
        )
        super().__init__(before, own)

    @property
    def owner(self) -> Any:
        return self._owner()

    def is_of(self, thing: Any) -> bool:
        return self.owner is thing

    def read(self, name: Any) -> Any:
        return self.owner.__dict__.get(name, MISSING)

    def write(self, name: Any, value: Any) -> None:
        self.owner.__dict__[name] = value

    def added(self) -> Any:
        if len(self.owner.__dict__) == self.count:
            return None
        return next((name for name in self.owner.__dict__ if self._is_new(name)), None)

    def restore(self) -> None:
        super().restore()
        for name in [name for name in self.owner.__dict__ if self._is_new(name)]:
            del self.owner.__dict__[name]

    def describe(self, name: Any) -> str:
        return f"a call changes {name!r} of {type(self.owner).__name__}"

    def _is_new(self, name: str) -> bool:
        return name not in self.before and not (isinstance(self.owner, nn.Module) and name in _OF_EVERY_MODULE)


@functools.lru_cache(maxsize=256)
def slots_of(kind: type) -> tuple[str, ...]:
    found = []
    for owner in kind.__mro__[:-1]:
        names = owner.__dict__.get("__slots__") or ()
        found += [names] if isinstance(names, str) else list(names)
    return tuple(name for name in found if not name.startswith("__"))


class Slots(Place):
    """The attributes of an object whose class names them."""

    def __init__(self, owner: Any, names: tuple[str, ...]):
        self.owner = owner
        super().__init__({name: self.read(name) for name in names})

    def read(self, name: Any) -> Any:
        return getattr(self.owner, name, MISSING)

    def write(self, name: Any, value: Any) -> None:
        delattr(self.owner, name) if value is MISSING else setattr(self.owner, name, value)


class PlainModules(Place):
    """The attributes of PyTorch's own modules: their calls change buffers at most, but a user may hang more on them."""

    grows = True

    def __init__(self, modules: list[nn.Module]):
        self._owners = list(map(weakref.ref, modules))
        self._sizes = [len(module.__dict__) for module in modules]
        own = [(i, module.__dict__) for i, module in enumerate(modules)]
        super().__init__({(i, name): x for i, held in own for name, x in held.items() if name not in _HELD_BY_MODULES})

    def _own(self, i: int) -> dict[str, Any]:
        owner = self._owners[i]()
        return {} if owner is None else owner.__dict__

    def read(self, name: Any) -> Any:
        return self._own(name[0]).get(name[1], MISSING)

    def write(self, name: Any, value: Any) -> None:
        self._own(name[0])[name[1]] = value

    def added(self) -> Any:
        return next((i for i, size in enumerate(self._sizes) if len(self._own(i)) != size), None)

    def is_of(self, thing: Any) -> bool:
        return any(owner() is thing for owner in self._owners)

    def restore(self) -> None:
        super().restore()
        for i in range(len(self._owners)):
            known = {name for j, name in self.before if j == i} | _HELD_BY_MODULES
            for name in [name for name in self._own(i) if name not in known]:
                del self._own(i)[name]

    def describe(self, name: Any) -> str:
        return f"a call changes {name[1]!r} of a module" if isinstance(name, tuple) else "a call gives a module more"


class Members(Place):
    """Members of classes and of Python modules, which a user may exchange for those of PyTorch's own too.

    Args:
        owned: pairs of an owner and a name.
    """

    counts = False

    def __init__(self, owned: Iterable[tuple[Any, str]]):
        super().__init__({entry: self.read(entry) for entry in owned})

    def read(self, name: Any) -> Any:
        return getattr(name[0], name[1], MISSING)

    def write(self, name: Any, value: Any) -> None:
        setattr(name[0], name[1], value)

    def describe(self, name: Any) -> str:
        return f"a call changes {name[1]!r} of {name[0].__name__}"


def calls_of(kinds: set[type[nn.Module]]) -> Members:
    """What a call of a module of each class runs."""
    return Members([*((kind, "forward") for kind in kinds), (nn.Module, "__call__"), (nn.Module, "__getattr__")])


def library_of(function: types.FunctionType) -> Members:
    """The functions of Python modules that a function names, such as `linear` of `torch.nn.functional`."""
    names = globals_of(function.__code__)
    owners = [x for name in names if isinstance(x := function.__globals__.get(name), types.ModuleType)]
    for owner in owners:  # a module in a module is one more
        held = [vars(owner).get(name) for name in names]
        owners += [x for x in held if isinstance(x, types.ModuleType) and x not in owners]
    return Members((owner, name) for owner in owners for name in names if callable(vars(owner).get(name)))


class ClassAttributes(Place):
    """The values of a class, and its methods."""

    grows = True

    def __init__(self, owner: type):
        self.owner = owner
        own = owner.__dict__
        super().__init__({name: own[name] for name in values_of(owner) if name in own}, own)

    def read(self, name: Any) -> Any:
        return self.owner.__dict__.get(name, MISSING)

    def write(self, name: Any, value: Any) -> None:
        setattr(self.owner, name, value)

    def added(self) -> Any:
        return None if len(self.owner.__dict__) == self.count else f"attributes of {self.owner.__name__}"


class Function(Place):
    """What a function is made of."""

    counts = False

    def __init__(self, function: types.FunctionType):
        self.function = function
        super().__init__({name: self.read(name) for name in ("__code__", "__defaults__", "__kwdefaults__")})

    def read(self, name: Any) -> Any:
        return getattr(self.function, name)

    def write(self, name: Any, value: Any) -> None:
        setattr(self.function, name, value)


class Array(Place):
    """The numbers of an array."""

    grows = True

    def __init__(self, array: np.ndarray):
        self.array, self.kept = array, array.copy()
        super().__init__({})

    def added(self) -> Any:
        same = np.array_equal(self.array, self.kept, equal_nan=self.array.dtype.kind in "fc")
        return None if same else "array"

    def restore(self) -> None:
        if self.array.flags.writeable:
            self.array[...] = self.kept


@functools.lru_cache(maxsize=256)
def values_of(owner: type) -> tuple[str, ...]:
    """Names of a class's methods, those that operators and attributes call among them, and plain values."""
    named = ((name, isinstance(value, types.FunctionType)) for name, value in owner.__dict__.items())
    return tuple(name for name, method in named if not name.startswith("__") or (method and name not in _NOT_OF_A_CALL))


class Variables(Place):
    """What a function closes over, and the globals that it names."""

    def __init__(self, function: types.FunctionType, seen: set[Any]):
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self.globals = function.__globals__
        super().__init__({name: self.read(name) for name in self._names(function.__code__, seen)})

    def _names(self, code: types.CodeType, seen: set[Any]) -> Iterator[str]:
        """The names of those that no other function has shown."""
        for name, cell in self.cells.items():
            if id(cell) not in seen:
                seen.add(id(cell))
                yield name
        for name in globals_of(code):
            key = id(self.globals), name
            if name in self.globals and key not in seen and not isinstance(self.globals[name], types.ModuleType | type):
                seen.add(key)
                yield name

    def read(self, name: Any) -> Any:
        if name not in self.cells:
            return self.globals.get(name, MISSING)
        try:
            return self.cells[name].cell_contents
        except ValueError:  # not filled yet
            return MISSING

    def write(self, name: Any, value: Any) -> None:
        if name in self.cells:
            self.cells[name].cell_contents = value
        else:
            self.globals[name] = value


@functools.lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that may be of globals, in a function and in those that it defines."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in globals_of(const)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


class Entries(Place):
    """The entries of a list, dict, set or deque."""

    grows = True

    def __init__(self, container: Any):
        self.container, self.kept = container, container.copy()
        self.counts = not isinstance(container, collections.deque)
        self._whole = isinstance(container, set) or len(container) > LARGE
        self._ordered = isinstance(container, dict) and len(container) > 1
        before = {} if self._whole else self.kept
        super().__init__(before if isinstance(before, dict) else dict(enumerate(before)), container)

    def read(self, name: Any) -> Any:
        if isinstance(self.container, dict):
            return self.container.get(name, MISSING)
        return self.container[name] if name < len(self.container) else MISSING

    def write(self, name: Any, value: Any) -> None:
        self.container[name] = value

    def added(self) -> Any:
        changed = len(self.container) != self.count or ((self._whole or self._ordered) and self._other())
        return type(self.container).__name__ if changed else None

    def _other(self) -> bool:
        """Whether an entry is another than it was, or the keys stand in another order."""
        if isinstance(self.container, set):
            return bool(self.kept != self.container)
        parts = _parts if self._whole else iter
        return not all(map(operator.is_, parts(self.container), parts(self.kept)))

    def restore(self) -> None:
        self.container.clear()
        self.container.extend(self.kept) if hasattr(self.container, "extend") else self.container.update(self.kept)


def _parts(container: Any) -> Iterable[Any]:
    """The entries of a container, the keys of a dict among them."""
    return itertools.chain.from_iterable(container.items()) if isinstance(container, dict) else container


class Counter:
    """A number that counts evaluations."""

    def __init__(self, place: Place, name: Any):
        self.place, self.name = place, name

    @property
    def value(self) -> Any:
        return self.place.read(self.name)

    @value.setter
    def value(self, number: Any) -> None:
        self.place.write(self.name, number)

    def add(self, count: int) -> None:
        self.value = self.value + count
