"""Programs of fields that have not changed since they were written: the next solve need not watch an evaluation.

A field is the same as long as everything is that its first evaluation could read: the modules with their parameters,
buffers and attributes, what functions close over, and the globals that they name. A program is kept from the second
solve of a field on, for many fields are made for one solve. It is forgotten with its field, and written anew from time
to time in any case.
"""

from __future__ import annotations

import collections
import itertools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from neuralode.kernels.places import MISSING, Counter, Members
from neuralode.kernels.program import Program
from neuralode.kernels.values import Made, Writer, flat
from neuralode.kernels.watch import HOOKS, Watch, hooks_everywhere

_USES = 256
"""Solves after which a program is written anew."""
_MOST = 16
"""Programs of one field, for states of different shapes."""
_HELD = ("_parameters", "_buffers", "_modules")

_MOST_FIELDS = 32
"""Fields of which programs are kept: what is kept may hold its own field, which would else never be freed."""


class _Met(NamedTuple):
    """A field that was solved before."""

    field: weakref.ref[Any]
    programs: dict[Any, Remembered]
    """By the circumstances."""


_remembered: collections.OrderedDict[int, _Met] = collections.OrderedDict()
"""By the identity of the field, the last one used at the end."""


def circumstances(t: torch.Tensor, y: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
    """What a program depends on besides the field."""
    return look(y), t.shape, t.dtype, modes()


def look(y: torch.Tensor | tuple[torch.Tensor, ...]) -> Any:
    """What a program depends on of a state."""
    if isinstance(y, tuple):
        return tuple(map(look, y))
    return y.shape, y.dtype, y.device, y.is_contiguous(), y.is_inference()


def modes() -> Any:
    """What it depends on of the thread that it runs in."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return grad, inference, torch.get_default_dtype(), torch._C._is_any_autocast_enabled(), hooked, function_modes()


def function_modes() -> tuple[type, ...]:
    """The kinds of the modes that see functions before PyTorch does."""
    return tuple(map(type, _get_current_function_mode_stack())) if torch._C._len_torch_function_stack() else ()


def remember(field: Callable[..., Any], when: Any, watch: Watch, writer: Writer, program: Program) -> Remembered | None:
    """Keeps a program for the next solve, if all its tensors can be found again; gives back what may be kept."""
    made = None if watch.draws or watch.opaque else _needed(watch.held(), writer)
    known = None if made is None else Remembered(watch, writer, program, made)
    if known is not None:
        _keep(field, when, known)
    return known


def remember_refusal(field: Callable[..., Any], when: Any, watch: Watch, reason: str) -> None:
    """Keeps why a field is no program, so that the next solve need not try."""
    if watch.too_much:
        _keep(field, when, _Refused(reason))
    elif not (watch.draws or watch.opaque):
        _keep(field, when, Remembered(watch, None, None, [], reason))


def _keep(field: Callable[..., Any], when: Any, known: Remembered) -> None:
    key, drop = id(field), _remembered.pop  # a name that is still there when the interpreter ends
    met = _remembered.get(key)
    if met is None or met.field() is not field:
        try:
            met = _Met(weakref.ref(field, lambda _: drop(key, None)), {})
        except TypeError:  # it cannot be referred to weakly
            return
        _remembered[key] = met
        while len(_remembered) > _MOST_FIELDS:
            _remembered.pop(next(iter(_remembered)), None)
        if not isinstance(known, _Refused):  # others hold what the field holds, and it may be solved but once
            return
    if len(met.programs) >= _MOST:
        met.programs.clear()
    met.programs[when] = known


def recall(field: Callable[..., Any], when: Any) -> Remembered | None:
    """The field's program under these circumstances, if it is known and the field has not changed."""
    met = _remembered.get(id(field))
    known = met.programs.get(when) if met else None
    if met is None or known is None:
        return None
    known.uses += 1
    if known.uses >= _USES:
        met.programs.pop(when, None)
    elif met.field() is field and known.holds():
        if len(_remembered) > _MOST_FIELDS // 2:
            _remembered.move_to_end(id(field))
        return known
    else:
        met.programs.clear()  # they hold what the field has held
    return None


def forget(field: Callable[..., Any]) -> None:
    """Drops what is known of a field."""
    _remembered.pop(id(field), None)


def _needed(held: set[int], writer: Writer) -> list[Made] | None:
    """The operations on what the field holds that make the program's tensors; None if some come from elsewhere."""
    makers = {id(x): step for step in writer.made for x in flat(step.out) if not any(x is y for y in step.args)}
    needed: dict[int, Made] = {}
    rest = [x for x in writer.sources if id(x) not in held]
    while rest:
        x = rest.pop()
        step = makers.get(id(x))
        if step is None or x.requires_grad != (writer.grad and any(y.requires_grad for y in _tensors(step))):
            return None  # made elsewhere, or where no gradient was to pass
        if isinstance(x.grad_fn, torch.autograd.function.BackwardCFunction):
            return None  # its gradient is the author's own
        needed[id(step.out)] = step
        held.add(id(x))
        rest += [x for x in _tensors(step) if id(x) not in held]
    return [step for step in writer.made if id(step.out) in needed]


def _tensors(step: Made) -> list[torch.Tensor]:
    return [x for given in (*step.args, *step.kwargs.values()) for x in flat(given)]


class Remembered:
    """A program, how to find its tensors, and what has to be as it was."""

    def __init__(self, watch: Watch, writer: Writer | None, program: Program | None, made: list[Made],
                 refusal: str = ""):  # fmt: skip
        self.program, self.uses, self.refusal = program, 0, refusal
        sources, tensors = (writer.sources, writer.tensors) if writer else ([], [])
        transposed = writer.to_transpose if writer else []
        self.counters = list(watch.counters)
        self._steps, number = _steps(made)
        self._sources = [_Source(number(x), i in transposed, wanted.shape)
                         for i, (x, wanted) in enumerate(zip(sources, tensors, strict=True))]  # fmt: skip
        self._as_held = [] if made or not all(map(operator.is_, sources, tensors)) else sources
        """The program's tensors, where they are just what the field holds."""
        given = [source.tensor for source in self._sources] + [x for step in self._steps for x in _tensors(step)]
        self._leaves = [x for x in given if isinstance(x, torch.Tensor)]
        self._kinds = list(map(_kind, self._leaves))
        counted = {(id(counter.place), counter.name) for counter in self.counters}
        self._modules = _Modules(watch.modules, self.counters)
        places = [place for place in watch.places if not any(place.is_of(module) for module in watch.modules)]
        self._places = [place for place in places if place.grows]
        self._members = _Members(place for place in places if isinstance(place, Members))
        self._values = [(place.read, name, x) for place in places for name, x in place.before.items()
                        if not isinstance(place, Members) and (id(place), name) not in counted]  # fmt: skip

    def holds(self) -> bool:
        """Whether the field is as it was."""
        return (
            not hooks_everywhere()
            and self._modules.hold()
            and self._members.hold()
            and all(read(name) is x for read, name, x in self._values)
            and all(place.added() is None for place in self._places)
            and list(map(_kind, self._leaves)) == self._kinds  # their memory may have been exchanged
        )

    def tensors(self) -> list[torch.Tensor]:
        """The program's tensors now, with their history."""
        if self._as_held:
            return list(self._as_held)
        made: list[torch.Tensor] = []
        for func, args, kwargs, _ in self._steps:
            given = {name: _with(made, x) for name, x in kwargs.items()}
            made += flat(func(*_with(made, args), **given))
        return [source.now(_with(made, source.tensor)) for source in self._sources]

    def count(self, evaluations: int) -> None:
        """Advances the field's own counters."""
        for counter in self.counters:
            counter.add(evaluations)


class _Refused(Remembered):
    """A field of which it takes too long to see whether it has changed."""

    def __init__(self, reason: str):
        self.program, self.uses, self.refusal = None, 0, reason

    def holds(self) -> bool:
        return True


class _Nth(int):
    """Stands for the nth tensor that steps make: those of the first solve take room, and views of a parameter that are
    kept are in the way of who exchanges it.
    """


def _steps(made: list[Made]) -> tuple[list[Made], Callable[[Any], Any]]:
    """Operations without the tensors that they have made, and what turns such a tensor into its number."""
    numbers: dict[int, _Nth] = {}
    count = itertools.count()

    def number(x: Any) -> Any:
        return [number(y) for y in x] if isinstance(x, list | tuple) else numbers.get(id(x), x)

    steps = []
    for func, args, kwargs, out in made:
        steps.append(Made(func, number(args), {name: number(x) for name, x in kwargs.items()}, None))
        numbers |= {id(x): _Nth(next(count)) for x in flat(out)}
    return steps, number


def _with(made: list[torch.Tensor], x: Any) -> Any:
    """An argument with tensors in the place of their numbers."""
    if isinstance(x, list | tuple):
        return [_with(made, y) for y in x]
    return made[x] if type(x) is _Nth else x


class _Source(NamedTuple):
    """A tensor that a program uses, and how."""

    tensor: Any
    """Or its number among those that are made."""
    transposed: bool
    shape: torch.Size

    def now(self, x: torch.Tensor) -> torch.Tensor:
        x = x.t() if self.transposed else x
        return x if x.shape == self.shape else x.reshape(self.shape)


_kind = operator.attrgetter("shape", "dtype", "requires_grad")


class _Members:
    """Members of classes and of Python modules, which are looked up without a function of Python's for each."""

    def __init__(self, places: Iterable[Members]):
        before = [entry for place in places for entry in place.before.items()]
        self._owners, self._names = [owner for (owner, _), _ in before], [name for (_, name), _ in before]
        self._values = [x for _, x in before]

    def hold(self) -> bool:
        now = map(getattr, self._owners, self._names, itertools.repeat(MISSING))
        return all(map(operator.is_, now, self._values))


class _Modules:
    """What the modules of a field consist of, but for its counters."""

    def __init__(self, modules: list[nn.Module], counters: list[Counter]):
        own = [module.__dict__ for module in modules]
        self._owners, self._kinds = list(map(weakref.ref, modules)), list(map(type, modules))
        self._dicts = [*own, *(attributes[name] for attributes in own for name in (*_HELD, *HOOKS))]
        self._sizes = list(map(len, self._dicts))
        self._filled = [held for held in self._dicts if held]
        self._children = [attributes["_modules"] for attributes in own if attributes["_modules"]]
        self._values = list(self._now())
        names = [(i, name) for i, attributes in enumerate(own) for name in attributes]
        moving = {(i, c.name) for i, module in enumerate(modules) for c in counters if c.place.is_of(module)}
        self._fixed = [entry not in moving for entry in names] + [True] * (len(self._values) - len(names))
        if moving:
            self._values = list(itertools.compress(self._values, self._fixed))
        self._count = bool(moving)

    def hold(self) -> bool:
        """Whether they are as they were."""
        if list(map(len, self._dicts)) != self._sizes:
            return False
        if list(map(type, map(operator.call, self._owners))) != self._kinds:
            return False
        now = itertools.compress(self._now(), self._fixed) if self._count else self._now()
        return all(map(operator.is_, now, self._values))

    def _now(self) -> Iterator[Any]:
        """Values, and the names of modules within modules, in order: a field may go through them."""
        return itertools.chain.from_iterable(itertools.chain(map(dict.values, self._filled), self._children))
