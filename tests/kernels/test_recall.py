"""Programs that are known from the last solve: taken again only while nothing that a field reads has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuralode.kernels.lower import Lowered, NotLowered, lower
from neuralode.kernels.recall import _USES
from neuralode.ode import solve

T0 = torch.tensor(0.3)
SCALE = 2.0


class Net(nn.Module):
    offset = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Softplus(), nn.Dropout(0.5), nn.Linear(5, 3)).eval()
        self.factor, self.nfe, self.coefficients, self.settings = 2.0, 0, [1.0, 2.0], {"power": 2, "base": 3}
        self.register_buffer("shift", torch.ones(3))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.nfe += 1
        dy = self.net(y ** self.settings["power"]) * self.factor + self.shift * self.coefficients[1]
        return SCALE * dy + self.offset


def again(field: Callable[..., Any], rows: int = 4, grad: bool = True) -> Lowered:
    y = torch.randn(rows, 3)
    with torch.set_grad_enabled(grad):
        lowered = lower(field, T0, y, ())
        torch.testing.assert_close(lowered.program(T0, y, lowered.tensors), field(T0, y))
    return lowered


def twice(field: Callable[..., Any], **how: Any) -> Lowered:
    """The program of the second solve, which is kept."""
    again(field, **how)
    return again(field, **how)


def known(lowered: Lowered) -> bool:
    return lowered.dy is None


def test_a_field_that_has_not_changed_is_known() -> None:
    field = Net()
    first, second, third = again(field), again(field), again(field)
    assert not known(first)
    assert not known(second)
    assert known(third)
    assert first.program is second.program is third.program
    assert not known(again(field, grad=False))
    assert not known(again(field, rows=5))
    assert known(again(field))
    assert not known(lower(field, T0.double(), torch.randn(4, 3), ()))


def replace_parameter(f: Net) -> None:
    f.net[0].weight = nn.Parameter(torch.randn(5, 3))


def wider(f: Net) -> None:
    f.net[0], f.net[3] = nn.Linear(3, 7), nn.Linear(7, 3)


def through_data(f: Net) -> None:
    f.net[0].weight.data, f.net[0].bias.data, f.net[3].weight.data = torch.randn(6, 3), torch.ones(6), torch.randn(3, 6)


CHANGES: dict[str, Callable[[Net], Any]] = {
    "an attribute": lambda f: setattr(f, "factor", 3.0),
    "an attribute of a layer of PyTorch's": lambda f: setattr(f.net[1], "beta", 2.0),
    "a parameter": replace_parameter,
    "a parameter through data": through_data,
    "a layer": wider,
    "the kind of a layer": lambda f: f.net.__setitem__(1, nn.Tanh()),
    "a buffer": lambda f: setattr(f, "shift", torch.randn(3)),
    "an entry of a list": lambda f: f.coefficients.__setitem__(1, 7.0),
    "an entry of a dict": lambda f: f.settings.update(power=3),
    "the order of a dict": lambda f: f.settings.update(power=f.settings.pop("power")),
    "the name of a layer": lambda f: f.net._modules.update(last=f.net._modules.pop("3")),
    "a new attribute": lambda f: setattr(f, "more", 1),
    "what wants gradients": lambda f: f.net[0].requires_grad_(False),
    "the forward of an object": lambda f: setattr(f, "forward", lambda t, y: 3 * y),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_field_that_has_changed_is_written_anew(change: Callable[[Net], Any]) -> None:
    field = Net()
    twice(field)
    change(field)
    assert not known(again(field))
    assert known(again(field))


@pytest.mark.parametrize("change", [lambda f: f.train(), lambda f: f.net[0].register_forward_hook(lambda *x: None)])
def test_what_stops_a_field_is_seen_later_too(change: Callable[[Net], Any]) -> None:
    field = Net()
    twice(field)
    change(field)
    with pytest.raises(NotLowered):
        lower(field, T0, torch.randn(4, 3), ())


def test_globals_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Net()
    twice(field)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert not known(again(field))
    monkeypatch.setattr(Net, "offset", 0.25)
    assert not known(again(field))


def test_closures() -> None:
    matrix, factor = torch.randn(3, 3, requires_grad=True), 2.0

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y**3) @ matrix * factor

    twice(field)
    assert known(again(field))
    factor = 3.0
    assert not known(again(field))
    with torch.no_grad():
        matrix.mul_(2)  # values may change: they are read in every solve
    assert known(again(field))


def test_counters_go_on() -> None:
    field = Net()
    for _ in range(2):
        lower(field, T0, torch.randn(4, 3), ()).count(6)
    assert field.nfe == 14
    field.nfe = 0
    third = lower(field, T0, torch.randn(4, 3), ())
    assert known(third)
    third.count(7)
    assert field.nfe == 7


def test_gradients_reach_the_parameters_every_time() -> None:
    field, y = Net(), torch.randn(4, 3)
    for _ in range(4):
        lowered = lower(field, T0, y, ())
        ours = torch.autograd.grad(lowered.program(T0, y, lowered.tensors).square().sum(), list(field.parameters()))
        theirs = torch.autograd.grad(field(T0, y).square().sum(), list(field.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


def test_what_is_made_of_parameters_is_made_again() -> None:
    weight, mask = torch.randn(3, 3, requires_grad=True), torch.tensor([1.0, 0.0, 1.0])

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        first, *rest = (weight * mask).exp().flip(1).unbind()
        return y @ torch.stack([first, *rest]).t()

    twice(field)
    with torch.no_grad():
        weight.mul_(2)
    y = torch.randn(4, 3)
    lowered = again(field)
    assert known(lowered)
    (ours,) = torch.autograd.grad(lowered.program(T0, y, lowered.tensors).square().sum(), weight)
    (theirs,) = torch.autograd.grad(field(T0, y).square().sum(), weight)
    torch.testing.assert_close(ours, theirs)


def test_what_no_gradient_passes_is_not_kept() -> None:
    weight = torch.randn(3, 3, requires_grad=True)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scaled = weight * 2
        return y @ scaled

    for _ in range(3):
        lowered = again(field)
        assert not known(lowered)
        assert not lowered.tensors[0].requires_grad


def test_what_comes_from_elsewhere_is_not_kept() -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * torch.tensor([1.0, 2.0, 3.0])

    twice(field)
    assert not known(again(field))


def test_a_refusal_is_remembered_until_the_field_changes() -> None:
    class Mixing(nn.Module):
        mixes = True

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y - y.mean(0) if self.mixes else -y

    field, y = Mixing(), torch.randn(4, 3)
    reasons = []
    for _ in range(3):
        with pytest.raises(NotLowered) as refused:
            lower(field, T0, y, ())
        reasons.append(str(refused.value))
    assert reasons[0] == reasons[1] == reasons[2]
    field.mixes = False
    assert not known(again(field))


def test_it_is_written_anew_from_time_to_time() -> None:
    field = Net()
    assert [known(again(field)) for _ in range(_USES + 3)].count(False) == 3


@pytest.mark.parametrize("use", [lambda f, y: y * f.nfe, lambda f, y: y * torch.tensor(float(f.nfe))])
def test_a_count_that_is_made_use_of_is_no_counter(use: Any) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nfe = 3

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.nfe += 1
            return use(self, y)

    field = Counting()
    with pytest.raises(NotLowered, match="calls change"):
        lower(field, T0, torch.randn(4, 3), ())
    assert field.nfe == 3


def test_a_flag_is_no_counter() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.begun = 0

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.begun = 1
            return -y

    with pytest.raises(NotLowered):
        lower(Once(), T0, torch.randn(4, 3), ())


class Rate:
    value = 1.0


@dataclasses.dataclass(slots=True)
class Slots:
    value: float = 1.0


class Unseen(nn.Module):
    """Reads numbers from where the watch does not follow them."""

    kind: Any = (1.0,)

    def __init__(self, read: Callable[[Unseen], float]):
        super().__init__()
        self.read, self.slots, self.array, self.long = read, Slots(), np.ones(1), [1.0] * 1000

    @property
    def scaled(self) -> float:
        return Rate.value

    @staticmethod
    def fixed() -> float:
        return Rate.value

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * float(self.read(self))


def holder(t: torch.Tensor, y: torch.Tensor, given: list[float] = [1.0]) -> torch.Tensor:  # noqa: B006
    return y * given[0] * holder.rate  # type: ignore[attr-defined]


def _change(f: Any, value: float) -> None:
    holder.__defaults__[0][0] = holder.rate = Rate.value = value  # type: ignore[attr-defined, index]
    if isinstance(f, Unseen):
        f.slots.value = f.array[0] = f.long[500] = value
        Unseen.kind = (value,)


@pytest.mark.parametrize("read", [
    lambda f: Rate.value, lambda f: f.scaled, lambda f: f.fixed(), lambda f: f.slots.value, lambda f: f.array[0],
    lambda f: f.long[500], lambda f: f.kind[0], None,
], ids=["class", "property", "static", "slots", "array", "long list", "tuple of the class", "function"])  # fmt: skip
def test_what_cannot_be_seen_is_not_remembered(read: Callable[[Unseen], float] | None) -> None:
    field = Unseen(read) if read else holder
    for value in (1.0, 1.0, 2.0, 3.0):
        _change(field, value)
        again(field)


class Sign(torch.autograd.Function):
    """Straight through, as the author of a quantised network has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


def test_gradients_that_an_author_wrote() -> None:
    weight, y0 = nn.Parameter(torch.randn(3, 3).double()), torch.randn(4, 3).double()

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ Sign.apply(weight))

    found = [
        torch.autograd.grad(
            solve(field, y0, [0.0, 1.0], engine=engine, method="rk4", step_size=0.1).ys.square().sum(), weight
        )[0]
        for engine in ("stepper", "auto", "auto", "auto")
    ]
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0])
