"""Fields that reach tensors besides the block's own: compiled or not, they get their gradients, or it is said."""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField, ODEBlock
from neuralode.nn.others import others_of
from neuralode.ode import SolverConfig

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
elsewhere: Any = types.ModuleType("elsewhere")  # as a module of the user's, which nobody looks into


def turned(y: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return torch.tanh(y @ by)


def field_of_a_call(t: torch.Tensor, y: torch.Tensor, by: Any) -> torch.Tensor:
    return turned(y, by[0])


class Outer(nn.Module):
    """Its own parameter is what its block's field needs."""

    def __init__(self, way: str = "closure"):
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.head = nn.Parameter(torch.randn(3, 3).double() * 0.3), nn.Linear(3, 1).double()
        fields: dict[str, Any] = {
            "closure": lambda t, y: turned(y, self.turn),
            "late": lambda t, y: turned(y, self.turn) if t > 0.5 else -y,
            "method": self.slope,
            "call": functools.partial(field_of_a_call, by=(self.turn,)),
        }
        self.block = ODEBlock(fields[way])

    def slope(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return turned(y, self.turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x))  # type: ignore[no-any-return]


class Hyper(nn.Module):
    """Sets what its block's field reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.block = nn.Linear(3, 9).double(), ODEBlock(self.slope)

    def slope(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.einsum("bij,bj->bi", self.now, y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.now = self.weights(x).reshape(-1, 3, 3)
        return self.block(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def gradients(model: nn.Module, call: Any, x: torch.Tensor = X) -> list[torch.Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("of_the_input", [False, True])
@pytest.mark.parametrize("way", ["closure", "late", "method", "call", "hyper"])
def test_others_get_their_gradients_of_a_block_that_is_left_out_with_one_warning(way: str, of_the_input: bool) -> None:
    model = Hyper() if way == "hyper" else Outer(way)
    expected, x = gradients(model, model), X.clone().requires_grad_(of_the_input)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")  # the compiler's, on Python 3.13.0
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(gradients(model, compiled, x), expected)
    assert len(said) == 1
    assert "leaves an ODEBlock out, for its field reaches" in str(said[0].message)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:torch.compile leaves")
def test_a_first_call_that_wants_no_gradient_does_not_cost_the_later_ones_theirs(mode: Any) -> None:
    model = Outer()
    compiled = torch.compile(model, backend="aot_eager")
    with mode():
        compiled(X)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, model))


@pytest.mark.filterwarnings("ignore:torch.compile leaves")
def test_a_parameter_that_is_unfrozen_gets_its_gradient() -> None:
    model = Outer()
    compiled = torch.compile(model, backend="aot_eager")
    model.turn.requires_grad_(False)
    compiled(X).sum().backward()
    model.turn.requires_grad_(True)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, model))


def test_a_whole_graph_is_refused_in_a_sentence() -> None:
    with pytest.raises(Exception, match=r"\(fullgraph=True\) cannot take an ODEBlock, for its field reaches turn"):
        torch.compile(Outer(), fullgraph=True, backend="eager")(X)


def test_a_constant_is_no_obstacle_until_it_wants_a_gradient() -> None:
    by = torch.eye(3).double()
    block = ODEBlock(lambda t, y: turned(y, by))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), block(X))
    by.requires_grad_()
    with pytest.raises(UsageError, match="reaches by, which wants a gradient by now"):
        compiled(X)


def test_statistics_of_an_earlier_solve_are_no_tensors_of_the_field() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ODEBlock(self.slope, SolverConfig(estimates=True))

        def slope(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.tanh(y)

    block = Plain().block
    block(X.clone().requires_grad_())
    assert block.stats is not None
    assert block.stats.error_estimate is not None
    assert block.stats.error_estimate.requires_grad
    assert not others_of(block, block.field).learned


@pytest.mark.filterwarnings("ignore:torch.compile leaves")
def test_what_cannot_be_seen_is_found_in_the_gradient() -> None:
    elsewhere.turn, calls = torch.eye(3).double().requires_grad_(), [0]

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return turned(y, elsewhere.turn)

    block = ODEBlock(field)
    expected = torch.autograd.grad(block(X).sum(), elsewhere.turn)
    compiled, calls[0] = torch.compile(block, backend="aot_eager"), 0
    with torch.no_grad(), pytest.warns(UserWarning, match="not the block's own"):
        compiled(X)
    assert block.stats is not None
    assert calls[0] == block.stats.nfe
    torch.testing.assert_close(torch.autograd.grad(compiled(X).sum(), elsewhere.turn), expected)
    other = torch.compile(ODEBlock(field), backend="aot_eager")
    for _ in range(2):
        with pytest.raises(UsageError, match="not the block's own"):
            other(X)


def test_a_first_call_is_counted_once() -> None:
    class Counting(MLPField):
        nfe = 0

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.nfe += 1
            return super().forward(t, y)

    block = ODEBlock(Counting(3, [4]).double())
    compiled = torch.compile(block, backend="eager")
    for calls in (1, 2):
        compiled(X)
        assert block.stats is not None
        assert block.field.nfe == calls * block.stats.nfe
