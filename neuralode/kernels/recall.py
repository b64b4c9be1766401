"""Programs of fields that have not changed since they were written: the next solve need not watch an evaluation.

A field is the same as long as everything is that its first evaluation could read: the modules with their parameters,
buffers and attributes, what functions close over, and the globals that they name. A program is forgotten with its
field, and written anew from time to time in any case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from neuralode.kernels.program import Program
from neuralode.kernels.values import Made, Writer
from neuralode.kernels.watch import Place, Watch

_USES = 64
"""Solves after which a program is written anew."""
_MOST = 16
"""Programs of one field, for states of different shapes."""
_HELD_APART = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_remembered: weakref.WeakKeyDictionary[Any, dict[Any, Remembered]] = weakref.WeakKeyDictionary()


def circumstances(t: torch.Tensor, y: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
    """What a program depends on besides the field."""
    parts = y if isinstance(y, tuple) else (y,)
    shapes = tuple((x.shape, x.dtype, x.device, x.is_contiguous()) for x in parts)
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    return isinstance(y, tuple), shapes, t.shape, t.dtype, modes


def remember(field: Callable[..., Any], when: Any, watch: Watch, writer: Writer, program: Program) -> None:
    """Keeps a program for the next solve, if all its tensors can be found again."""
    made = None if watch.draws else _needed(watch.held(), writer)
    if made is None:
        return
    try:
        found = _remembered.setdefault(field, {})
    except TypeError:  # it cannot be referred to weakly
        return
    if len(found) >= _MOST:
        found.clear()
    found[when] = Remembered(watch, writer, program, made)


def recall(field: Callable[..., Any], when: Any) -> Remembered | None:
    """The field's program under these circumstances, if it is known and the field has not changed."""
    try:
        found = _remembered.get(field)
    except TypeError:
        return None
    known = found.get(when) if found else None
    if found is None or known is None:
        return None
    known.uses += 1
    if known.uses < _USES and known.holds():
        return known
    del found[when]
    return None


def _needed(held: set[int], writer: Writer) -> list[Made] | None:
    """The operations on what the field holds that make the program's tensors; None if some come from elsewhere."""
    makers = {id(step.out): step for step in writer.made if not any(step.out is x for x in step.args)}
    needed: dict[int, Made] = {}
    rest = [x for x in writer.sources if id(x) not in held]
    while rest:
        x = rest.pop()
        step = makers.get(id(x))
        if step is None or x.requires_grad != (writer.grad and any(y.requires_grad for y in _tensors(step))):
            return None  # made elsewhere, or where no gradient was to pass
        needed[id(x)] = step
        rest += [x for x in _tensors(step) if id(x) not in held and id(x) not in needed]
    return [step for step in writer.made if id(step.out) in needed]


def _tensors(step: Made) -> list[torch.Tensor]:
    return [x for x in (*step.args, *step.kwargs.values()) if isinstance(x, torch.Tensor)]


class Remembered:
    """A program, how to find its tensors, and what has to be as it was."""

    def __init__(self, watch: Watch, writer: Writer, program: Program, made: list[Made]):
        self.program, self.uses, self._made = program, 0, made
        self.counters = [(counter.place, counter.name) for counter in watch.counters]
        self._sources = [_Source(x, i in writer.to_transpose, wanted.shape)
                         for i, (x, wanted) in enumerate(zip(writer.sources, writer.tensors, strict=True))]  # fmt: skip
        self._leaves = [_Leaf(x, x.shape, x.dtype, x.requires_grad) for x in
                        (*writer.sources, *(x for step in made for x in _tensors(step)))]  # fmt: skip
        self._modules = [_ModuleState(module) for module in watch.modules]
        counted = {(id(place), name) for place, name in self.counters}
        for place, name in self.counters:
            for state in self._modules:
                if place.is_of(state.module()):
                    state.attributes.pop(name, None)
        self._places = [
            (place, {name: x for name, x in place.before.items() if (id(place), name) not in counted})
            for place in watch.places if not any(place.is_of(module) for module in watch.modules)
        ]  # fmt: skip

    def holds(self) -> bool:
        """Whether the field is as it was."""
        everywhere = nn.modules.module
        if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
            return False
        return (
            all(state.holds() for state in self._modules)
            and all(_unchanged(place, before) for place, before in self._places)
            and all(leaf.holds() for leaf in self._leaves)
        )

    def tensors(self) -> list[torch.Tensor]:
        """The program's tensors now, with their history."""
        now: dict[int, torch.Tensor] = {}
        for func, args, kwargs, out in self._made:
            args = [now.get(id(x), x) for x in args]
            now[id(out)] = func(*args, **{name: now.get(id(x), x) for name, x in kwargs.items()})
        return [source.now(now.get(id(source.tensor), source.tensor)) for source in self._sources]

    def count(self, evaluations: int) -> None:
        """Advances the field's own counters."""
        for place, name in self.counters:
            place.write(name, place.read(name) + evaluations)


class _Source(NamedTuple):
    """A tensor that a program uses, and how."""

    tensor: torch.Tensor
    transposed: bool
    shape: torch.Size

    def now(self, x: torch.Tensor) -> torch.Tensor:
        x = x.t() if self.transposed else x
        return x if x.shape == self.shape else x.reshape(self.shape)


class _Leaf(NamedTuple):
    tensor: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    def holds(self) -> bool:
        """Whether the tensor, whose memory may have been exchanged, is of the same kind."""
        x = self.tensor
        return x.shape == self.shape and x.dtype == self.dtype and x.requires_grad == self.requires_grad


class _ModuleState:
    def __init__(self, module: nn.Module):
        self.module = weakref.ref(module)
        own = module.__dict__
        self.attributes = {name: own[name] for name in own if name not in _HELD_APART}
        self.held = tuple(dict(own[name]) for name in _HELD_APART)
        self.size = len(own)

    def holds(self) -> bool:
        module = self.module()
        if module is None:
            return False
        own = module.__dict__
        if len(own) != self.size or any(own[name] for name in _HOOKS):
            return False
        for name, before in self.attributes.items():
            if own.get(name) is not before:
                return False
        return all(_same(own[name], before) for name, before in zip(_HELD_APART, self.held, strict=True))


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return len(now) == len(before) and all(now.get(name) is x for name, x in before.items())


def _unchanged(place: Place, before: dict[Any, Any]) -> bool:
    return all(place.read(name) is x for name, x in before.items()) and place.added() is None
