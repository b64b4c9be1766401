"""Programs that are known from the last solve: what is held for them, and what is not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from neuralode.kernels.lower import NotLowered, lower
from tests.kernels.test_recall import T0, Net, again, known, replace_parameter, twice


def test_a_field_that_is_gone_is_forgotten() -> None:
    field = Net()
    twice(field)
    gone, parameter = weakref.ref(field), weakref.ref(field.net[0].weight)
    del field
    gc.collect()
    assert gone() is None
    assert parameter() is None


def test_a_field_of_one_solve_is_not_held() -> None:
    refusing, lowered = [], []
    for _ in range(3):
        large = torch.randn(3)
        again(lambda t, y, large=large: y * large)
        lowered.append(weakref.ref(large))
        large = torch.randn(3)
        with pytest.raises(NotLowered):
            lower(lambda t, y, large=large: y * large - y.mean(0), T0, torch.randn(4, 3), ())
        refusing.append(weakref.ref(large))
        del large
    gc.collect()
    assert not any(ref() is not None for ref in (*lowered, *refusing))


def test_what_a_field_has_held_is_given_up() -> None:
    field = Net()
    twice(field)
    again(field, rows=5)
    before = weakref.ref(field.net[0].weight)
    replace_parameter(field)
    again(field)
    gc.collect()
    assert before() is None


def test_what_is_made_of_parameters_is_not_held() -> None:
    weight = nn.Parameter(torch.randn(3, 17))

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ weight.exp()) @ weight.sin().t()

    assert known([again(field) for _ in range(3)][-1])
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape in ((3, 17), (17, 3))]


def test_parameters_may_be_exchanged() -> None:
    layer = nn.Linear(3, 3)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(y @ layer.weight.T) @ layer.weight

    assert known([again(field) for _ in range(3)][-1])
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(3, 3)))
    again(field)
