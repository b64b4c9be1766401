"""What a field may do that its operations do not show: the kernels leave it to the stepper, or follow it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuralode import ODEBlock, SolverConfig, solve
from neuralode.kernels import recall
from neuralode.kernels.cpu import CPUSolve
from neuralode.kernels.library import library, why_not
from neuralode.nn import MLPField

pytestmark = pytest.mark.skipif(library() is None, reason=why_not())
FIXED = {"method": "rk4", "step_size": 0.1}


def agree(field: Callable[..., Any], y0: Any, **how: Any) -> torch.Tensor:
    """Solves with both engines, the fused one first, and compares."""
    ys = [solve(field, y0, [0.0, 1.0], engine=engine, **(how or FIXED)).ys for engine in ("auto", "stepper")]
    torch.testing.assert_close(*ys, rtol=1e-5, atol=1e-6)
    return ys[0]


@pytest.mark.parametrize(
    "field",
    [
        lambda t, y: torch.tensor([y[1], -y[0]]),
        lambda t, y: torch.as_tensor([y[1], -y[0]]),
        lambda t, y: y.new_tensor([y[1], -y[0]]),
        lambda t, y: -y + torch.tensor([0.0, torch.sin(5 * t)]),
        lambda t, y: torch.tensor([[torch.cos(t), -1.0], [1.0, 0.0]]) @ y,
        lambda t, y: -y * torch.tensor([torch.sign(t - 0.5), 1.0]),
    ],
)
def test_tensors_made_of_lists_of_values(field: Callable[..., Any]) -> None:
    agree(field, torch.tensor([2.0, 0.5]))


def test_values_that_hang_on_pytorch_s_own_modules() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Identity()
            self.memory.last = None

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            dy = -y if self.memory.last is None else -y - 0.5 * self.memory.last
            self.memory.last = y.detach()
            return dy

    ys = [solve(Remembering(), torch.ones(1, 1), [0.0, 1.0], engine=e, **FIXED).ys for e in ("auto", "stepper")]
    torch.testing.assert_close(*ys)


def test_a_list_on_a_layer_that_changes_between_solves() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.layer.gains = [1.0]

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(y) * self.layer.gains[0]

    field = Scaled()
    before = agree(field, torch.ones(2, 3))
    field.layer.gains[0] = -1.0
    assert not torch.allclose(agree(field, torch.ones(2, 3)), before)


def counting(how: Any) -> Callable[..., Any]:
    """Fields that use a count which they keep in various places."""
    array, held = np.zeros(1), [np.linspace(0, 1, 100)]

    class Slots:
        __slots__ = ("n",)

        def __init__(self) -> None:
            self.n = 0

    slots = Slots()

    def in_array(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        array[0] += 1
        return -y * float(held[0][int(array[0])])

    def in_slots(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        slots.n += 1
        return -y / slots.n

    return {"array": in_array, "slots": in_slots}[how]


@pytest.mark.parametrize("how", ["array", "slots"])
def test_counts_that_are_made_use_of(how: str) -> None:
    ys = [solve(counting(how), torch.ones(1), [0.0, 1.0], engine=e, **FIXED).ys for e in ("auto", "stepper")]
    torch.testing.assert_close(*ys)


def test_defaults_and_code_of_a_function() -> None:
    def field(t: torch.Tensor, y: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        return -rate * y

    def other(t: torch.Tensor, y: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        return rate * y

    first = agree(field, torch.ones(2))
    field.__defaults__ = (2.0,)
    second = agree(field, torch.ones(2))
    field.__code__ = other.__code__
    assert len({float(ys[-1, 0]) for ys in (first, second, agree(field, torch.ones(2)))}) == 3


def test_a_buffer_that_decides() -> None:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("switch", torch.zeros(2))

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y if torch.equal(self.switch, torch.zeros(2)) else y

    field = Switched()
    before = agree(field, torch.ones(2))
    field.switch.fill_(1.0)
    assert not torch.allclose(agree(field, torch.ones(2)), before)


def test_more_parts_than_the_kernels_take() -> None:
    y0 = tuple(torch.ones(4, 2) for _ in range(17))
    assert solve(lambda t, y: tuple(-p for p in y), y0, [0.0, 1.0]).stats.engine == "stepper"
    assert solve(lambda t, y: [-p for p in y], y0[:16], [0.0, 1.0]).stats.engine == "fused"


def test_a_bias_of_rows_is_none_of_features() -> None:
    bias = nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]))
    weight = torch.eye(3)
    for _ in range(3):
        agree(lambda t, y: torch.addmm(bias, y, weight), torch.ones(3, 3))


@pytest.mark.parametrize("activation", [nn.ELU(alpha=-0.5), nn.Softplus(threshold=1.0)], ids=str)
def test_activations_whose_value_does_not_tell_their_slope(activation: nn.Module) -> None:
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    y0, found = torch.tensor([[-1.0], [0.9]]), []
    for engine in ("auto", "stepper"):
        y = y0.clone().requires_grad_()
        ys = solve(lambda t, y: activation(layer(y)), y, [0.0, 1.0], method="euler", step_size=1.0, engine=engine).ys
        found.append(torch.autograd.grad(ys[-1].sum(), y)[0])
    torch.testing.assert_close(*found)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    y0 = torch.randn(300, 2, requires_grad=True)
    return solve(MLPField(2, [16]), y0, [0.0, 1.0]).ys, y0


def test_a_backward_pass_after_one_that_was_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    ys, y0 = problem()
    (wanted,) = torch.autograd.grad(ys.sum(), y0, retain_graph=True)

    def broken_off(self: CPUSolve, go_on: Callable[[], int]) -> None:
        assert go_on() == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CPUSolve, "_run", broken_off)
        patch.setattr("neuralode.kernels.cpu._PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            torch.autograd.grad(100 * ys.sum(), y0, retain_graph=True)
    (found,) = torch.autograd.grad(ys.sum(), y0)
    assert torch.equal(found, wanted)


def test_backward_passes_in_several_threads() -> None:
    ys, y0 = problem()
    (wanted,) = torch.autograd.grad(ys.sum(), y0, retain_graph=True)
    found: list[torch.Tensor] = []

    def pull(scale: float) -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(scale * ys.sum(), y0, retain_graph=True)[0] / scale)

    threads = [threading.Thread(target=pull, args=(scale,)) for scale in (1.0, 2.0, 4.0, 8.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(torch.equal(x, wanted) for x in found)


def test_fields_are_freed() -> None:
    class Rate:
        def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y

    kept = []
    for _ in range(3 * recall._MOST_FIELDS):
        field = Rate()
        for _ in range(2):
            solve(field, torch.ones(1), [0.0, 1.0])
        kept.append(weakref.ref(field))
    del field
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= recall._MOST_FIELDS


def test_an_attribute_that_refuses_to_be_looked_at() -> None:
    class Trainer:
        pass

    class Field(nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -y

    field, trainer = Field(), Trainer()
    field.trainer = weakref.proxy(trainer)
    del trainer
    agree(field, torch.ones(2))


def test_a_compiled_block_augments_once() -> None:
    block = ODEBlock(MLPField(4, [8]), augment=2)
    x = torch.ones(3, 2)
    torch.testing.assert_close(torch.compile(block, backend="eager")(x), block(x))


def test_dropout_in_a_compiled_block_has_no_gradient_of_other_masks() -> None:
    class Noisy(nn.Linear):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(y), 0.5)  # which no module of PyTorch's shows

    block = ODEBlock(Noisy(2, 2), SolverConfig(**FIXED))
    ys = torch.compile(block, backend="eager")(torch.randn(4, 2))
    with pytest.raises(ValueError, match="draws random numbers"):
        ys.sum().backward()


def test_a_block_is_copied_whatever_it_solved_last() -> None:
    block = ODEBlock(nn.Linear(3, 3), SolverConfig(estimates=True))
    block(torch.ones(2, 3))
    torch.testing.assert_close(copy.deepcopy(block)(torch.ones(2, 3)), block(torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("field", "rate"),
    [(lambda y, k=2.0: -k * y, 2.0), (lambda t, y=None: -y, 1.0), (lambda _t, y=None: -y, 1.0)],
)
def test_a_field_with_an_option(field: Callable[..., Any], rate: float) -> None:
    y1 = ODEBlock(field, SolverConfig(rtol=1e-6, atol=1e-8))(torch.ones(1, 1))
    torch.testing.assert_close(y1, torch.exp(torch.tensor([[-rate]])), rtol=1e-5, atol=1e-6)


def test_events_that_jump_and_events_in_inference_mode() -> None:
    jumping = solve(lambda t, y: torch.ones_like(y), torch.tensor([[-1.5]]), [0.0, 3.0],
                    events=lambda t, y: y[:, 0].sign() + 0.1 * y[:, 0])  # fmt: skip
    torch.testing.assert_close(jumping.events.ts, torch.tensor([1.5]), rtol=0, atol=1e-5)
    with torch.inference_mode():
        found = solve(lambda t, y: torch.ones_like(y), torch.tensor([[-1.5]]), [0.0, 3.0], events=lambda t, y: y[:, 0])
        stiff = solve(lambda t, y: -1000 * (y - torch.cos(t)), torch.ones(1, 1), [0.0, 1.0], method="esdirk4")
    torch.testing.assert_close(found.events.ts, torch.tensor([1.5]), rtol=0, atol=1e-5)
    assert stiff.stats.accepted < 100


def test_events_before_every_inner_time_and_no_samples_at_all() -> None:
    y0 = torch.tensor([[-0.5], [-0.4]])
    found = solve(lambda t, y: torch.ones_like(y), y0, [0.0, 2.0, 3.0], events=lambda t, y: y[:, 0], per_sample=True)
    torch.testing.assert_close(found.ys[1:], torch.zeros(2, 2, 1), rtol=0, atol=1e-5)
    assert solve(lambda t, y: -y, torch.zeros(0, 2), [0.0, 1.0], per_sample=True).ys.shape == (2, 0, 2)


def test_equal_steps_in_single_precision() -> None:
    for end in (0.3, 0.6, 1.2):
        found = solve(lambda t, y: -y, torch.ones(2, 1), [0.0, end], method="rk4", step_size=0.1)
        assert found.stats.accepted == round(end / 0.1)


def test_a_start_that_changes_in_place_is_noticed() -> None:
    layer, y0 = nn.Linear(2, 2), torch.ones(3, 2)
    ys = solve(lambda t, y: torch.tanh(layer(y)), y0, [0.0, 1.0], engine="stepper").ys
    y0.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()
