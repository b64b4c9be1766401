"""What a field reads by ways that its code does not show: the next solve has to notice that it has changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from neuralode import solve
from neuralode.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels are built")
GAIN = 1.0
Y0 = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def gain() -> Iterator[None]:
    global GAIN
    GAIN = 1.0
    yield
    GAIN = 1.0


class Base(nn.Module):
    """tanh of a layer, times a gain."""

    def __init__(self, **held: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.__dict__.update(held)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * self.gain


class ByGetattr(Base):
    def __getattr__(self, name: str) -> Any:
        return GAIN if name == "gain" else super().__getattr__(name)


class Descriptor:
    def __get__(self, owner: Any, kind: Any) -> float:
        return GAIN


class ByDescriptor(Base):
    gain: Any = Descriptor()


class Indexed:
    def __getitem__(self, index: int) -> float:
        return GAIN

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -y * GAIN

    def __mul__(self, x: torch.Tensor) -> torch.Tensor:
        return x * GAIN


class ByEntry(Base):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * self.held[0]


class ByOperator(Base):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.held * torch.tanh(self.layer(y))


class ByTensor(Base):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * self.layer.weight.gain


class ByHeld(Base):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(y)) * self.held.gain


class AList(list):  # type: ignore[type-arg]
    pass


class ADict(dict):  # type: ignore[type-arg]
    pass


class ATuple(tuple):  # type: ignore[type-arg]
    pass


def check(field: Any, change: Any) -> None:
    """That the solve after the change is right, and that the change matters."""
    how: dict[str, Any] = {"method": "rk4", "step_size": 0.25}
    for _ in range(3):
        before = solve(field, Y0, [0.0, 1.0], **how)
    assert before.stats.engine == "fused"
    change()
    after = [solve(field, Y0, [0.0, 1.0], **how).ys for _ in range(2)]
    expected = solve(field, Y0, [0.0, 1.0], engine="stepper", **how).ys
    assert not torch.allclose(before.ys, expected, rtol=1e-2)
    for ys in after:
        torch.testing.assert_close(ys, expected)


@pytest.mark.parametrize(
    "field",
    [ByGetattr(), ByDescriptor(), ByEntry(held=Indexed()), ByOperator(held=Indexed()), Indexed()],
    ids=["__getattr__", "descriptor", "__getitem__", "__mul__", "__call__"],
)
def test_a_global_that_a_method_of_an_operator_reads(field: Any) -> None:
    def change() -> None:
        global GAIN
        GAIN = 3.0

    check(field, change)


@pytest.mark.parametrize("held", [AList(), ADict(), ATuple(), functools.partial(print)], ids=lambda x: type(x).__name__)
def test_an_attribute_of_what_has_entries(held: Any) -> None:
    held.gain = 1.0
    check(ByHeld(held=held), lambda: setattr(held, "gain", 3.0))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "plain"])
def test_an_attribute_of_a_tensor(kind: str) -> None:
    field: Any = ByTensor() if kind == "parameter" else ByHeld()
    if kind == "buffer":
        field.register_buffer("held", torch.ones(1))
    elif kind == "plain":
        field.held = torch.ones(1)
    tensor: Any = field.layer.weight if kind == "parameter" else field.held
    tensor.gain = 1.0
    check(field, lambda: setattr(tensor, "gain", 3.0))


@pytest.mark.parametrize(("kind", "name"), [(nn.Linear, "forward"), (nn.Tanh, "forward"), (nn.Module, "__call__")])
def test_a_method_of_pytorch_that_is_exchanged(kind: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    field, kept = Base(gain=1.0), getattr(kind, name)
    field.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    check(field, lambda: monkeypatch.setattr(kind, name, lambda self, *args: 1.5 * kept(self, *args)))


@pytest.mark.parametrize(("owner", "name"), [(nn.functional, "linear"), (torch, "tanh"), (math, "exp")])
def test_a_function_that_is_exchanged(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Field(Base):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(y)) * math.exp(0.1)

    kept = getattr(owner, name)
    check(Field(), lambda: monkeypatch.setattr(owner, name, lambda *args: 1.5 * kept(*args)))


def test_a_method_of_a_dict() -> None:
    settings = {"gain": 1.0}

    class Field(Base):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(y)) * self.look_up("gain")

    check(Field(look_up=settings.get), lambda: settings.update(gain=3.0))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is torch.tanh else out


def test_a_mode_around_the_solve() -> None:
    field = Base(gain=1.0)
    plain = solve(field, Y0, [0.0, 1.0])
    with Doubling():
        assert solve(field, Y0, [0.0, 1.0]).stats.engine == "stepper"
    again = solve(field, Y0, [0.0, 1.0])
    assert again.stats.engine == "fused"
    torch.testing.assert_close(again.ys, plain.ys)
    with torch.device("cpu"):  # a mode of PyTorch's own, for tensors that are made
        assert solve(field, Y0, [0.0, 1.0]).stats.engine == "fused"


class Tagged(torch.Tensor):
    """A tensor that may have attributes."""


def test_an_attribute_of_a_tensor_of_a_class_of_its_own() -> None:
    rate: Any = torch.tensor(1.0).as_subclass(Tagged)
    rate.gain = 1.0
    for gain in (1.0, 3.0):
        rate.gain = gain
        found = solve(lambda t, y: -y * rate.gain, Y0, [0.0, 1.0]).ys
        torch.testing.assert_close(found[1], Y0 * math.exp(-gain), rtol=1e-3, atol=1e-4)
