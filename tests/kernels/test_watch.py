"""What a field counts goes on counting, and whatever else it changes is seen and put back."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.kernels.lower import NotLowered, lower
from neuralode.kernels.watch import Watch

CALLS = 0
LOG: list[int] = []


class Meter:
    def __init__(self) -> None:
        self.n = 0

    def tick(self) -> None:
        self.n += 1


class Field(nn.Module):
    """A field that does something else besides."""

    total = 0

    def __init__(self, effect: Callable[[Any, torch.Tensor], None]):
        super().__init__()
        self.effect = effect
        self.nfe, self.calls, self.last = 0, 0.0, None
        self.stats, self.history, self.meter = {"nfe": 0, "inner": {"n": 0}}, [0, []], Meter()
        self.seen, self.recent, self.long = {1}, deque([1, 2], maxlen=2), list(range(5000))
        self.default, self.many = defaultdict(int), {i: i for i in range(5000)}
        self.net = nn.Linear(3, 3)
        self.register_buffer("buffer", torch.zeros(3))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.effect(self, y)
        return self.net(y)

    def state(self) -> Any:
        """Everything that an effect may change."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("effect", "meter")}
        own |= {"net": list(self._modules), "buffer": self.buffer.tolist(), "n": vars(self.meter)}
        own |= {"CALLS": CALLS, "LOG": LOG, "total": vars(Field)["total"]}
        return copy.deepcopy(own)


def count_global(self: Field, y: torch.Tensor) -> None:
    global CALLS
    CALLS += 1


def count_global_deeper(self: Field, y: torch.Tensor) -> None:
    count_global(self, y)


def count_twice(self: Field, y: torch.Tensor) -> None:
    count_global(self, y)
    count_global(self, y)


def setting(name: str, value: Any) -> Callable[[Field, torch.Tensor], None]:
    return lambda self, y: setattr(self, name, value(self) if callable(value) else value)


def count_item(self: Field, y: torch.Tensor) -> None:
    self.stats["nfe"] += 1


def count_inner_item(self: Field, y: torch.Tensor) -> None:
    self.stats["inner"]["n"] += 1


def count_list(self: Field, y: torch.Tensor) -> None:
    self.history[0] += 1


def count_class(self: Field, y: torch.Tensor) -> None:
    Field.total += 1


COUNTERS: dict[str, tuple[Callable[..., None], Callable[[Field], float]]] = {
    "attribute": (setting("nfe", lambda self: self.nfe + 1), lambda self: self.nfe),
    "float": (setting("calls", lambda self: self.calls + 1), lambda self: self.calls),
    "dict": (count_item, lambda self: self.stats["nfe"]),
    "dict in a dict": (count_inner_item, lambda self: self.stats["inner"]["n"]),
    "list": (count_list, lambda self: self.history[0]),
    "object": (lambda self, y: self.meter.tick(), lambda self: self.meter.n),
    "global": (count_global, lambda self: CALLS),
    "global of a helper": (count_global_deeper, lambda self: CALLS),
    "class": (count_class, lambda self: Field.total),
}

EFFECTS: dict[str, Callable[[Field, torch.Tensor], Any]] = {
    "two at once": setting("nfe", lambda self: self.nfe + 2),
    "global by two": count_twice,
    "flag": setting("last", True),
    "cached state": lambda self, y: setattr(self, "last", y),
    "new attribute": lambda self, y: setattr(self, "first", y),
    "attribute deleted": lambda self, y: delattr(self, "last"),
    "appended": lambda self, y: self.history.append(1),
    "appended within": lambda self, y: self.history[1].append(y),
    "appended to many": lambda self, y: self.long.append(1),
    "appended to a global": lambda self, y: LOG.append(1),
    "emptied": lambda self, y: self.history.clear(),
    "new key": lambda self, y: self.stats.update(more=1),
    "new key of many": lambda self, y: self.many.update(more=1),
    "default": lambda self, y: self.default["nfe"],
    "key deleted": lambda self, y: self.stats.pop("nfe"),
    "key replaced": lambda self, y: (self.stats.pop("nfe"), self.stats.update(more=1)),
    "keys in another order": lambda self, y: self.stats.update(nfe=self.stats.pop("nfe")),
    "keys of many in another order": lambda self, y: self.many.update({0: self.many.pop(0)}),
    "set": lambda self, y: self.seen.add(2),
    "set replaced": lambda self, y: (self.seen.clear(), self.seen.add(2)),
    "deque": lambda self, y: self.recent.append(3),
    "buffer": lambda self, y: self.buffer.add_(1),
    "new buffer": lambda self, y: setattr(self, "buffer", torch.ones(3)),
    "object": lambda self, y: setattr(self.meter, "n", 7),
    "class": lambda self, y: setattr(Field, "total", Field.total + 3),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_counters(name: str) -> None:
    effect, value = COUNTERS[name]
    field = Field(effect)
    start = value(field)
    lowered = lower(field, torch.tensor(0.0), torch.rand(4, 3), ())
    assert value(field) == start + 1
    lowered.count(10)
    assert value(field) == start + 11
    field(torch.tensor(0.0), torch.rand(4, 3))
    assert value(field) == start + 12


@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("held", [lambda f: f, lambda f: lambda t, y: f(t, y), lambda f: f.forward],
                         ids=["itself", "closed over", "method"])  # fmt: skip
def test_effects_are_refused_and_put_back(name: str, held: Callable[[Field], Any]) -> None:
    field = Field(EFFECTS[name])
    before = field.state()
    with pytest.raises(NotLowered):
        lower(held(field), torch.tensor(0.0), torch.rand(4, 3), ())
    assert field.state() == before


def test_variables_of_an_enclosing_function() -> None:
    calls, scale = 0, 1.0

    def counting(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return -y

    def shrinking(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls, scale
        calls += 1
        scale /= 2
        return -scale * y

    lowered = lower(counting, torch.tensor(0.0), torch.rand(4, 3), ())
    lowered.count(3)
    assert calls == 4
    with pytest.raises(NotLowered, match="scale"):
        lower(shrinking, torch.tensor(0.0), torch.rand(4, 3), ())
    assert (calls, scale) == (4, 1.0)


def test_a_tensor_of_the_first_call_is_not_used_later() -> None:
    cache: dict[str, torch.Tensor] = {}

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y - cache.setdefault("first", y)

    with pytest.raises(NotLowered, match="changes"):
        lower(field, torch.tensor(0.0), torch.rand(4, 3), ())
    assert cache == {}


def test_a_compiled_function_is_looked_into_for_what_was_compiled() -> None:
    calls = [0]

    def twice(y: torch.Tensor) -> torch.Tensor:
        calls[0] += 2
        return 2 * y

    compiled = torch.compile(twice, backend="eager")
    watch = Watch(lambda t, y: compiled(y))
    assert len(watch.places) < 30, "the compiler's own things are left alone"
    with pytest.raises(NotLowered, match="a call changes 0"):
        lower(lambda t, y: compiled(y), torch.tensor(0.0), torch.rand(4, 3), ())
    assert calls == [0]
