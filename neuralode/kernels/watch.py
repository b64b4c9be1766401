"""What a call of a field leaves behind: a program has no side effects, so that they would happen once only."""

from __future__ import annotations

import collections
import enum
import functools
import io
import logging
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from neuralode.kernels.places import (
    LARGE,
    Array,
    Attributes,
    ClassAttributes,
    Counter,
    Entries,
    Function,
    Members,
    Place,
    PlainModules,
    Slots,
    Variables,
    calls_of,
    globals_of,
    library_of,
    slots_of,
)
from neuralode.kernels.tally import TALLIES, rose_by_one

_CONTAINERS = (list, dict, set, collections.deque)
_WITH_ENTRIES = (*_CONTAINERS, tuple, functools.partial)
"""Types of which subclasses may have attributes besides."""
_PLAIN = frozenset({
    int, float, bool, str, bytes, type(None), types.CodeType, torch.Tensor, nn.Parameter, torch.dtype, torch.device,
    *TALLIES.values(),
})  # fmt: skip
"""Types of values that hold nothing to look at, but for the attributes that a user gives a tensor."""
_TENSORS = (torch.Tensor, nn.Parameter)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""
_FROM_AFAR = frozenset({
    "environ", "getenv", "globals", "locals", "modules", "import_module", "__import__", "eval", "exec",
})  # fmt: skip
"""Names by which a function may read what it does not name."""
_DEEPEST, _MOST_PLACES = 8, 256
"""How far, and at how many things, is looked for a program that is to be kept."""
_DEEPEST_OF_ALL, _MOST_OF_ALL, _MOST_NUMBERS = 32, 4096, 10**6
"""How far, at how many things, and at how large arrays at all: a field that holds more is taken for no program."""
_KNOWN_PACKAGES = frozenset({
    "torch", "neuralode", "builtins", "math", "cmath", "operator", "functools", "itertools", "typing", "numpy", "types",
    "abc", "collections", "contextlib", "dataclasses", "enum", "einops", "copy", "warnings", "sys", "os", "time",
})  # fmt: skip
"""Packages whose modules and classes a field may name: what they hold is not a user's to change."""
_COMPILER = "torch._dynamo"
"""Where functions are made that call compiled ones, amid much that belongs to the compiler."""
_FROZEN = (torch.Tensor, str, bytes, complex, range, slice, enum.Enum, torch.Generator, types.WrapperDescriptorType,
           types.MethodDescriptorType, np.generic, logging.Logger, io.IOBase)  # fmt: skip
"""Types whose values do not change, or are looked at elsewhere."""
_GIVING = (random.Random, np.random.Generator, np.random.RandomState, Iterator)
"""Types that give something else each time."""
_CLOCKS_AND_DICE = frozenset({"time", "datetime", "secrets", "uuid"})
"""Modules that do."""
_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)


class Watch:
    """Looks at a field before and after one call.

    It sees the attributes of the field's modules and objects and of their classes, the variables that functions and
    methods close over and the globals that they name, and what lists, dicts, sets and deques among them hold. A number
    that rose by one is taken for a count of evaluations, the usual `self.nfe += 1`.
    """

    def __init__(self, field: Callable[..., Any]):
        self.modules: list[nn.Module] = []
        self.places: list[Place] = []
        self.seen: set[Any] = set()
        """The ids of what was looked at, among others."""
        self.opaque = False
        """Whether it holds or names something whose changes cannot be seen, so that nothing may be remembered of it."""
        self._random: Any = None
        """Where the generators of Python and NumPy stand, if a function names them."""
        self._gives = ""
        self.too_much = False
        """Whether it holds more than can be looked at."""
        self._enter(field)
        if self.modules:
            self._enter_calls(calls_of(set(map(type, self.modules))))
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
        if self.too_much:
            return "it holds more than can be looked at"
        if self._gives:
            return self._gives
        for module in self.modules:
            if isinstance(module, torch.jit.ScriptModule):
                return f"{type(module).__name__} is a TorchScript module"
            if has_hooks(module):
                return f"{type(module).__name__} has hooks"
            if hasattr(module, "_orig_mod"):
                return "it is compiled by torch.compile"
        return ""

    def changes(self) -> str:
        """What the call changed besides counters, by name; empty if nothing. Fills `counters`."""
        for place in self.places:
            for name, before in place.before.items():
                now = place.read(name)
                if now is not before:
                    if not (place.counts and rose_by_one(before, now)):
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
        if type(thing) in _PLAIN or id(thing) in self.seen:
            if type(thing) in _TENSORS and thing.__dict__ and id(thing) not in self.seen:
                self.seen.add(id(thing))
                self._look_at(Attributes(thing), depth)
            return
        if depth > _DEEPEST or len(self.places) > _MOST_PLACES:
            self.opaque = True
        if depth > _DEEPEST_OF_ALL or len(self.places) > _MOST_OF_ALL:
            self.too_much = True
            return
        self.seen.add(id(thing))
        if isinstance(thing, nn.Module):
            plain = []
            for module in thing.modules():
                if module is thing or id(module) not in self.seen:
                    self.seen.add(id(module))
                    self.modules.append(module)
                    for tensor in (*module._parameters.values(), *module._buffers.values()):
                        self._enter(tensor, depth)
                    if type(module).__module__.startswith("torch.nn.modules"):
                        plain.append(module)
                    else:
                        self._enter_object(module, depth)
            if plain:
                self._look_at(PlainModules(plain), depth)
        elif isinstance(thing, types.MethodType):
            self._enter(thing.__self__, depth)
            self._enter(thing.__func__, depth)
        elif isinstance(thing, _BOUND):  # of a dict, a list, a generator of random numbers
            if not isinstance(thing.__self__, type | types.ModuleType):
                self._enter(thing.__self__, depth)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._enter(part, depth + 1)
        elif isinstance(thing, types.FunctionType) and str(thing.__globals__.get("__name__")).startswith(_COMPILER):
            self.opaque = True
            for cell in thing.__closure__ or ():  # in one of which is what was compiled
                self._enter(cell.cell_contents, depth + 1)
        elif isinstance(thing, types.FunctionType):
            if self._random is None and "random" in globals_of(thing.__code__):
                self._random = _generators()
            self._look_at(Variables(thing, self.seen), depth)
            self._enter_names(thing, depth)
            self.places.append(library_of(thing))
            self._look_at(Function(thing), depth)
            if thing.__dict__:
                self._look_at(Attributes(thing), depth)
        elif isinstance(thing, tuple):
            self._weigh(thing)
            for part in thing if len(thing) <= LARGE else ():
                self._enter(part, depth + 1)
        elif isinstance(thing, _CONTAINERS):
            self._weigh(thing)
            self._look_at(Entries(thing), depth)
        elif isinstance(thing, type | types.ModuleType):
            self.opaque |= not _is_of_known_package(thing)
            if isinstance(thing, type):
                self._enter_class(thing, depth)
        elif type(thing).__module__.startswith(_COMPILER):
            self.opaque = True
        elif isinstance(thing, _FROZEN):
            self.opaque |= isinstance(thing, torch.Tensor)  # of a class that may give it attributes of its own
        elif isinstance(thing, _GIVING):
            self._gives = f"it holds a {type(thing).__name__}, and what a call takes of that cannot be given back"
        elif isinstance(thing, np.ndarray):
            self.opaque = True
            self.too_much |= thing.size > _MOST_NUMBERS
            if not self.too_much:
                self._look_at(Array(thing), depth)
        elif isinstance(thing, staticmethod | classmethod | property):
            for function in (getattr(thing, "__func__", None), getattr(thing, "fget", None)):
                self._enter(function, depth + 1)
        else:
            kind: type = type(thing)
            if slots := slots_of(kind):
                self._look_at(Slots(thing, slots), depth)
            self.opaque |= bool(slots) or not hasattr(thing, "__dict__")
            if hasattr(thing, "__dict__"):
                self._enter_object(thing, depth)

        if isinstance(thing, _WITH_ENTRIES) and hasattr(thing, "__dict__"):
            self._enter_object(thing, depth)

    def _enter_calls(self, calls: Members) -> None:
        """Watches what calls of modules run; PyTorch's own code is not looked at, but what a user puts there is."""
        self.places.append(calls)
        for function in calls.before.values():
            if _package_of(function) not in _KNOWN_PACKAGES:
                self._enter(function)
            elif isinstance(function, types.FunctionType):
                self.places.append(library_of(function))

    def _weigh(self, container: Any) -> None:
        """Notes whether a container has entries that are too many to look into."""
        if len(container) > LARGE:
            self.opaque = True
            parts = container.values() if isinstance(container, dict) else container
            self.too_much |= not _PLAIN.issuperset(map(type, parts))

    def _enter_names(self, function: types.FunctionType, depth: int) -> None:
        """Looks whether a function names modules or classes of the user's, whose methods are not followed."""
        names, of_user = globals_of(function.__code__), _package_of(function) not in _KNOWN_PACKAGES
        self.opaque |= not _FROM_AFAR.isdisjoint(names)
        for name in names:
            thing = function.__globals__.get(name)
            if isinstance(thing, type | types.ModuleType) and not _is_of_known_package(thing):
                self.opaque = True
            if isinstance(thing, type):
                self._enter_class(thing, depth)
            if of_user and (name == "urandom" or _package_of(thing) in _CLOCKS_AND_DICE):
                self._gives = f"it names {name!r}, which gives something else each time"

    def _enter_object(self, thing: Any, depth: int) -> None:
        self._look_at(Attributes(thing), depth)
        self._enter_class(type(thing), depth)

    def _enter_class(self, kind: type, depth: int) -> None:
        for owner in kind.__mro__:
            if _package_of(owner) not in _KNOWN_PACKAGES and ("class", id(owner)) not in self.seen:
                self.seen.add(("class", id(owner)))
                self._look_at(ClassAttributes(owner), depth)

    def _look_at(self, place: Place, depth: int) -> None:
        self.places.append(place)
        for value in place.before.values():
            self._enter(value, depth + 1)


def _package_of(thing: Any) -> str:
    """The package of a module, or the one that a class or a function comes from."""
    name = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return str(name or "").partition(".")[0]


def _is_of_known_package(thing: type | types.ModuleType) -> bool:
    return _package_of(thing) in _KNOWN_PACKAGES or (isinstance(thing, type) and issubclass(thing, nn.Module))


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own."""
    return any(module.__dict__[name] for name in HOOKS)


def hooks_everywhere() -> bool:
    """Whether a call of any module runs hooks."""
    shared = nn.modules.module
    forwards = shared._global_forward_hooks or shared._global_forward_pre_hooks
    return bool(forwards or shared._global_backward_hooks or shared._global_backward_pre_hooks)


def _generators() -> Any:
    return random.getstate(), np.random.get_state()  # noqa: NPY002
