"""What a call of a field leaves behind: a program has no side effects, so that they would happen once only."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_CONTAINERS = (list, dict, set)
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"_buffers"}
"""Attributes by which PyTorch itself keeps a module; parameters and hooks are looked at otherwise."""


class Watch:
    """Looks at a field before and after one call.

    It sees the attributes of the field's modules and objects, the variables that a function closes over and the globals
    that it names, each with what lists, dicts and sets among them hold. A number that rose by one is taken for a count
    of evaluations, the usual `self.nfe += 1`.
    """

    def __init__(self, field: Callable[..., Any]):
        self.modules: list[nn.Module] = []
        self._places: list[_Place] = []
        self._seen: set[int] = set()
        self._enter(field)
        self.counters: list[_Counter] = []

    def obstacle(self) -> str:
        """Why the field should not be called for its program at all; empty if it may be."""
        everywhere = nn.modules.module
        if (
            everywhere._global_forward_hooks
            or everywhere._global_forward_pre_hooks
            or everywhere._global_backward_hooks
        ):
            return "there are hooks on all modules"
        for module in self.modules:
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return f"{type(module).__name__} has hooks"
            if isinstance(module, torch.jit.ScriptModule):
                return f"{type(module).__name__} is a TorchScript module"
            if hasattr(module, "_orig_mod"):
                return "it is compiled by torch.compile"
        return ""

    def changes(self) -> str:
        """What the call changed besides counters, by name; empty if nothing. Fills `counters`."""
        for place in self._places:
            for name, before in place.before.items():
                now = place.read(name)
                if now is not before:
                    if not _rose_by_one(before, now):
                        return place.describe(name)
                    self.counters.append(_Counter(place, name))
                kept = place.contents.get(name)
                if kept is not None and (changed := self._content_changed(place, name, now, kept)):
                    return changed
            if added := place.added():
                return place.describe(added)
        return ""

    def undo_counts(self) -> None:
        """Takes back what the call counted."""
        for counter in self.counters:
            counter.add(-1)

    def _content_changed(self, place: _Place, name: str, now: Any, kept: Any) -> str:
        if len(now) != len(kept):
            return place.describe(name)
        if isinstance(now, set):
            return "" if now == kept else place.describe(name)
        keys = list(now) if isinstance(now, dict) else range(len(now))
        for key in keys:
            before = kept.get(key, _MISSING) if isinstance(kept, dict) else kept[key]
            if now[key] is before:
                continue
            if not _rose_by_one(before, now[key]):
                return place.describe(name)
            self.counters.append(_Counter(_Items(now), key))
        return ""

    def _enter(self, thing: Any, depth: int = 0) -> None:
        """Watches a module, a function or an object, and what they hold."""
        if id(thing) in self._seen or depth > 3:
            return
        self._seen.add(id(thing))
        if isinstance(thing, nn.Module):
            for module in thing.modules():
                if module is thing or id(module) not in self._seen:
                    self._seen.add(id(module))
                    self.modules.append(module)
                    if not type(module).__module__.startswith("torch.nn.modules"):  # whose calls change buffers at most
                        self._places.append(_Attributes(module))
        elif isinstance(thing, types.MethodType):
            self._enter(thing.__self__, depth)
            self._enter(thing.__func__, depth)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self._enter(part, depth + 1)
        elif isinstance(thing, types.FunctionType):
            place: _Place = _Variables(thing)
            self._places.append(place)
            for value in place.before.values():
                self._enter(value, depth + 1)
        elif isinstance(thing, list | tuple):
            for part in thing[:16]:
                self._enter(part, depth + 1)
        elif hasattr(thing, "__dict__") and not isinstance(thing, type | types.ModuleType | torch.Tensor):
            place = _Attributes(thing)
            self._places.append(place)
            for value in place.before.values():
                self._enter(value, depth + 1)


_MISSING = object()


def _rose_by_one(before: Any, now: Any) -> bool:
    return type(before) in (int, float) and type(now) is type(before) and now == before + 1


class _Place:
    """Named values that a call may change."""

    before: dict[Any, Any]

    def __init__(self) -> None:
        self.contents = {
            name: value.copy() for name, value in self.before.items()
            if isinstance(value, _CONTAINERS) and len(value) <= 64
        }  # fmt: skip

    def read(self, name: Any) -> Any: ...

    def write(self, name: Any, value: Any) -> None: ...

    def added(self) -> Any:
        """A name that was not there before, if there is one."""
        return None

    def describe(self, name: Any) -> str:
        return f"a call changes {name!r}"


class _Attributes(_Place):
    def __init__(self, owner: Any):
        self.owner = owner
        own = owner.__dict__.items()
        if isinstance(owner, nn.Module):
            self.before = {name: value for name, value in own if name not in _OF_EVERY_MODULE}
        else:
            self.before = dict(own)
        self.count = len(own)
        super().__init__()

    def read(self, name: Any) -> Any:
        return self.owner.__dict__.get(name, _MISSING)

    def write(self, name: Any, value: Any) -> None:
        self.owner.__dict__[name] = value

    def added(self) -> Any:
        if len(self.owner.__dict__) == self.count:
            return None
        known = self.before.keys() | _OF_EVERY_MODULE
        return next((name for name in self.owner.__dict__ if name not in known), None)

    def describe(self, name: Any) -> str:
        return f"a call changes {name!r} of {type(self.owner).__name__}"


class _Variables(_Place):
    """What a function closes over, and the globals that it names."""

    def __init__(self, function: types.FunctionType):
        self.cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        self.globals = function.__globals__
        self.before = {name: self.read(name) for name in self._names(function.__code__)}
        super().__init__()

    def _names(self, code: types.CodeType) -> Iterator[str]:
        yield from self.cells
        for name in code.co_names:
            if name in self.globals and not isinstance(self.globals[name], types.ModuleType | type):
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


class _Items(_Place):
    """The entries of a list or dict."""

    def __init__(self, container: Any):
        self.container = container

    def read(self, name: Any) -> Any:
        return self.container[name]

    def write(self, name: Any, value: Any) -> None:
        self.container[name] = value


class _Counter:
    """A number that counts evaluations."""

    def __init__(self, place: _Place, name: Any):
        self.place, self.name = place, name

    def add(self, count: int) -> None:
        self.place.write(self.name, self.place.read(self.name) + count)
