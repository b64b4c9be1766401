"""What a call of a field leaves behind: a program has no side effects, so that they would happen once only."""

from __future__ import annotations

import collections
import enum
import functools
import io
import logging
import random
import types
import weakref
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import nn

_CONTAINERS = (list, dict, set, collections.deque)
_PLAIN = frozenset({
    int, float, bool, str, bytes, type(None), types.CodeType, torch.Tensor, nn.Parameter, torch.dtype, torch.device,
})  # fmt: skip
"""Types of values that hold nothing to look at."""
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"_buffers"}
"""Attributes by which PyTorch itself keeps a module; parameters and hooks are looked at otherwise."""
_HELD_BY_MODULES = frozenset(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""
_FROM_AFAR = frozenset({
    "environ", "getenv", "globals", "locals", "modules", "import_module", "__import__", "eval", "exec",
})  # fmt: skip
"""Names by which a function may read what it does not name."""
_LARGE = 256
"""Entries of a container beyond which only their number is looked at."""
_DEEPEST, _MOST_PLACES = 8, 256
"""How far, and at how many things, is looked."""
_KNOWN_PACKAGES = frozenset({
    "torch", "neuralode", "builtins", "math", "cmath", "operator", "functools", "itertools", "typing", "numpy", "types",
    "abc", "collections", "contextlib", "dataclasses", "enum", "einops", "copy", "warnings", "sys", "os", "time",
})  # fmt: skip
"""Packages whose modules and classes a field may name: what they hold is not a user's to change."""
_FROZEN = (torch.Tensor, str, bytes, complex, range, slice, enum.Enum, torch.Generator, types.BuiltinFunctionType,
           types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType, np.generic, logging.Logger,
           io.IOBase)  # fmt: skip
"""Types whose values do not change, or are looked at elsewhere."""
_GIVING = (random.Random, np.random.Generator, np.random.RandomState, Iterator)
"""Types that give something else each time."""


class Watch:
    """Looks at a field before and after one call.

    It sees the attributes of the field's modules and objects and of their classes, the variables that functions and
    methods close over and the globals that they name, and what lists, dicts, sets and deques among them hold. A number
    that rose by one is taken for a count of evaluations, the usual `self.nfe += 1`.
    """

    def __init__(self, field: Callable[..., Any]):
        self.modules: list[nn.Module] = []
        self.places: list[Place] = []
        self._seen: set[Any] = set()
        self.opaque = False
        """Whether it holds or names something whose changes cannot be seen, so that nothing may be remembered of it."""
        self._random: Any = None
        """Where the generators of Python and NumPy stand, if a function names them."""
        self._gives = ""
        self._enter(field)
        self.counters: list[Counter] = []

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers."""
        return self._random is not None

    def held(self) -> set[int]:
        """What the field holds, by itself or in what it names: the ids, tensors' among them."""
        held = {id(x) for module in self.modules for x in (*module._parameters.values(), *module._buffers.values())}
        return held | {id(x) for place in self.places for x in place.before.values()}

    def obstacle(self) -> str:
        """Why the field should not be called for its program at all; empty if it may be."""
        if hooks_everywhere():
            return "there are hooks on all modules"
        if self._gives:
            return self._gives
        for module in self.modules:
            if has_hooks(module):
                return f"{type(module).__name__} has hooks"
            if isinstance(module, torch.jit.ScriptModule):
                return f"{type(module).__name__} is a TorchScript module"
            if hasattr(module, "_orig_mod"):
                return "it is compiled by torch.compile"
        return ""

    def changes(self) -> str:
        """What the call changed besides counters, by name; empty if nothing. Fills `counters`."""
        for place in self.places:
            for name, before in place.before.items():
                now = place.read(name)
                if now is not before:
                    if not (place.counts and _rose_by_one(before, now)):
                        return place.describe(name)
                    self.counters.append(Counter(place, name))
            if (added := place.added()) is not None:
                return place.describe(added)
        if self._random is not None and repr(self._random) != repr(_generators()):
            return "it draws random numbers"
        return ""

    def restore(self) -> None:
        """Puts back what the call has changed."""
        for place in self.places:
            place.restore()
        self.counters.clear()
        if self._random is not None:
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])  # noqa: NPY002

    def _enter(self, thing: Any, depth: int = 0) -> None:
        """Watches a module, a function or an object, and what they hold."""
        if type(thing) in _PLAIN or id(thing) in self._seen:
            return
        if depth > _DEEPEST or len(self.places) > _MOST_PLACES:
            self.opaque = True
            return
        self._seen.add(id(thing))
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if module is thing or id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.modules.append(module)
                    if not type(module).__module__.startswith("torch.nn.modules"):
                        self._enter_object(module, depth)
            plain = [m for m in thing.modules() if type(m).__module__.startswith("torch.nn.modules")]
            if plain := [m for m in plain if ("plain", id(m)) not in self._seen]:
                self._seen.update(("plain", id(m)) for m in plain)
                self._look_at(_PlainModules(plain), depth)
        elif isinstance(thing, types.MethodType):
            self._enter(thing.__self__, depth)
            self._enter(thing.__func__, depth)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._enter(part, depth + 1)
        elif isinstance(thing, types.FunctionType):
            if self._random is None and "random" in _globals_of(thing.__code__):
                self._random = _generators()
            self._look_at(_Variables(thing, self._seen), depth)
            self._enter_names(thing, depth)
            self._look_at(_Function(thing), depth)
            if thing.__dict__:
                self._look_at(_Attributes(thing), depth)
        elif isinstance(thing, tuple):
            self.opaque |= len(thing) > _LARGE
            for part in thing[:_LARGE]:
                self._enter(part, depth + 1)
        elif isinstance(thing, _CONTAINERS):
            self.opaque |= len(thing) > _LARGE
            self._look_at(_Entries(thing), depth)
        elif isinstance(thing, type | types.ModuleType):
            self.opaque |= not _is_of_known_package(thing)
            if isinstance(thing, type):
                self._enter_class(thing, depth)
        elif isinstance(thing, _FROZEN):
            pass
        elif isinstance(thing, _GIVING):
            self._gives = f"it holds a {type(thing).__name__}, and what a call takes of that cannot be given back"
        elif isinstance(thing, np.ndarray):
            self.opaque = True
            self._look_at(_Array(thing), depth)
        elif isinstance(thing, staticmethod | classmethod | property):
            for function in (getattr(thing, "__func__", None), getattr(thing, "fget", None)):
                self._enter(function, depth + 1)
        else:
            kind: type = type(thing)
            if slots := _slots_of(kind):
                self._look_at(_Slots(thing, slots), depth)
            self.opaque |= bool(slots) or not hasattr(thing, "__dict__")
            if hasattr(thing, "__dict__"):
                self._enter_object(thing, depth)

    def _enter_names(self, function: types.FunctionType, depth: int) -> None:
        """Looks whether a function names modules or classes of the user's, whose methods are not followed."""
        names = _globals_of(function.__code__)
        self.opaque |= not _FROM_AFAR.isdisjoint(names)
        for name in names:
            thing = function.__globals__.get(name)
            if isinstance(thing, type | types.ModuleType) and not _is_of_known_package(thing):
                self.opaque = True
            if isinstance(thing, type):
                self._enter_class(thing, depth)

    def _enter_object(self, thing: Any, depth: int) -> None:
        self._look_at(_Attributes(thing), depth)
        self._enter_class(type(thing), depth)

    def _enter_class(self, kind: type, depth: int) -> None:
        for owner in kind.__mro__:
            if owner.__module__.partition(".")[0] not in _KNOWN_PACKAGES and ("class", id(owner)) not in self._seen:
                self._seen.add(("class", id(owner)))
                self._look_at(_ClassAttributes(owner), depth)

    def _look_at(self, place: Place, depth: int) -> None:
        self.places.append(place)
        for value in place.before.values():
            self._enter(value, depth + 1)


def _is_of_known_package(thing: type | types.ModuleType) -> bool:
    name = thing.__module__ if isinstance(thing, type) else thing.__name__
    return name.partition(".")[0] in _KNOWN_PACKAGES or (isinstance(thing, type) and issubclass(thing, nn.Module))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return any(module.__dict__[name] for name in HOOKS)


def hooks_everywhere() -> bool:
    """Whether a call of any module runs hooks."""
    shared = nn.modules.module
    forwards = shared._global_forward_hooks or shared._global_forward_pre_hooks
    return bool(forwards or shared._global_backward_hooks or shared._global_backward_pre_hooks)


_MISSING = object()


def _generators() -> Any:
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def _rose_by_one(before: Any, now: Any) -> bool:
    return type(before) in (int, float) and type(now) is type(before) and now == before + 1


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


class _Attributes(Place):
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
        return self.owner.__dict__.get(name, _MISSING)

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
def _slots_of(kind: type) -> tuple[str, ...]:
    found = []
    for owner in kind.__mro__[:-1]:
        names = owner.__dict__.get("__slots__") or ()
        found += [names] if isinstance(names, str) else list(names)
    return tuple(name for name in found if not name.startswith("__"))


class _Slots(Place):
    """The attributes of an object whose class names them."""

    def __init__(self, owner: Any, names: tuple[str, ...]):
        self.owner = owner
        super().__init__({name: self.read(name) for name in names})

    def read(self, name: Any) -> Any:
        return getattr(self.owner, name, _MISSING)

    def write(self, name: Any, value: Any) -> None:
        delattr(self.owner, name) if value is _MISSING else setattr(self.owner, name, value)


class _PlainModules(Place):
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
        return self._own(name[0]).get(name[1], _MISSING)

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


class _ClassAttributes(Place):
    """The values of a class, and its methods."""

    grows = True

    def __init__(self, owner: type):
        self.owner = owner
        own = owner.__dict__
        super().__init__({name: own[name] for name in _values_of(owner) if name in own}, own)

    def read(self, name: Any) -> Any:
        return self.owner.__dict__.get(name, _MISSING)

    def write(self, name: Any, value: Any) -> None:
        setattr(self.owner, name, value)

    def added(self) -> Any:
        return None if len(self.owner.__dict__) == self.count else f"attributes of {self.owner.__name__}"


class _Function(Place):
    """What a function is made of."""

    counts = False

    def __init__(self, function: types.FunctionType):
        self.function = function
        super().__init__({name: self.read(name) for name in ("__code__", "__defaults__", "__kwdefaults__")})

    def read(self, name: Any) -> Any:
        return getattr(self.function, name)

    def write(self, name: Any, value: Any) -> None:
        setattr(self.function, name, value)


class _Array(Place):
    """The numbers of an array, if they are few."""

    grows = True

    def __init__(self, array: np.ndarray):
        self.array = array
        self.kept = array.copy() if array.size <= _LARGE else None
        super().__init__({})

    def added(self) -> Any:
        same = self.kept is None or np.array_equal(self.array, self.kept, equal_nan=self.array.dtype.kind in "fc")
        return None if same else "array"

    def restore(self) -> None:
        if self.kept is not None and self.array.flags.writeable:
            self.array[...] = self.kept


@functools.lru_cache(maxsize=256)
def _values_of(owner: type) -> tuple[str, ...]:
    """Names of a class's methods and plain values."""
    return tuple(name for name in owner.__dict__ if not name.startswith("__") or name == "__call__")


class _Variables(Place):
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
        for name in _globals_of(code):
            key = id(self.globals), name
            if name in self.globals and key not in seen and not isinstance(self.globals[name], types.ModuleType | type):
                seen.add(key)
                yield name

    def read(self, name: Any) -> Any:
        if name not in self.cells:
            return self.globals.get(name, _MISSING)
        try:
            return self.cells[name].cell_contents
        except ValueError:  # not filled yet
            return _MISSING

    def write(self, name: Any, value: Any) -> None:
        if name in self.cells:
            self.cells[name].cell_contents = value
        else:
            self.globals[name] = value


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that may be of globals, in a function and in those that it defines."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _globals_of(const)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))


class _Entries(Place):
    """The entries of a list, dict, set or deque."""

    grows = True

    def __init__(self, container: Any):
        self.container = container
        self.counts = not isinstance(container, collections.deque)
        self.kept = container.copy() if len(container) <= _LARGE else None
        before = {} if self.kept is None or isinstance(container, set) else self.kept
        super().__init__(before if isinstance(before, dict) else dict(enumerate(before)), container)

    def read(self, name: Any) -> Any:
        if isinstance(self.container, dict):
            return self.container.get(name, _MISSING)
        return self.container[name] if name < len(self.container) else _MISSING

    def write(self, name: Any, value: Any) -> None:
        self.container[name] = value

    def added(self) -> Any:
        changed = isinstance(self.container, set) and self.kept not in (None, self.container)
        return type(self.container).__name__ if changed or len(self.container) != self.count else None

    def restore(self) -> None:
        if self.kept is not None:
            self.container.clear()
            self.container.extend(self.kept) if hasattr(self.container, "extend") else self.container.update(self.kept)
        while len(self.container) > self.count:
            self.container.popitem() if isinstance(self.container, dict) else self.container.pop()


class Counter:
    """A number that counts evaluations."""

    def __init__(self, place: Place, name: Any):
        self.place, self.name = place, name

    def add(self, count: int) -> None:
        self.place.write(self.name, self.place.read(self.name) + count)
