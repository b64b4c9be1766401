"""Random fields: each is refused, or its program equals it at another state and time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from neuralode.kernels.lower import NotLowered, lower
from tests.kernels.test_lower import assert_equals_field, double

__all__ = ["double"]

Values = list[torch.Tensor]
Expression = Callable[..., torch.Tensor]

ONE: list[Expression] = [
    torch.tanh, torch.sin, F.softplus, F.elu, F.silu, torch.neg,
    lambda x: x**2, lambda x: 0.5 * x - 1, lambda x: 1 - x, lambda x: 1 / (2 + x * x), lambda x: (1 + x * x).sqrt(),
    lambda x: x.view_as(x), lambda x: x.clone(), lambda x: x.unsqueeze(-1), lambda x: x.unsqueeze(0),
    lambda x: x.unsqueeze(1), lambda x: x.squeeze(-1), lambda x: x.squeeze(), lambda x: x.squeeze(0),
    lambda x: x[..., 0], lambda x: x[..., :1], lambda x: x[..., 1:], lambda x: x[..., -1], lambda x: x[..., -2:],
    lambda x: x[0], lambda x: x[:1], lambda x: x[:, None], lambda x: x[None], lambda x: x[..., None],
    lambda x: x[:, 0], lambda x: x[:, :2], lambda x: x[:, -1:], lambda x: x[..., ::2],
    lambda x: x.sum(-1), lambda x: x.sum(1, keepdim=True), lambda x: x.mean(-1, keepdim=True), lambda x: x.sum(0),
    lambda x: x.mean(0, keepdim=True), lambda x: x.sum(), lambda x: x.t(), lambda x: x.transpose(0, -1),
    lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: x.reshape(-1), lambda x: x.reshape(x.shape[::-1]),
    lambda x: x.reshape(1, -1), lambda x: x.reshape(-1, 1), lambda x: x.reshape(-1, 1, 1), lambda x: x.flatten(),
    lambda x: x.reshape(-1, 2), lambda x: x.reshape(2, -1), lambda x: x.unbind(-1)[0], lambda x: x.unbind(0)[-1],
    lambda x: x.chunk(2, -1)[-1], lambda x: torch.cat(x.split(1, -1)[::-1], -1), lambda x: torch.cat([x, x], 0),
    lambda x: torch.cat([x, 2 * x], -1), lambda x: torch.stack([x, 2 * x], -1), lambda x: torch.stack([x, -x]),
    lambda x: torch.stack([x, x], 1), lambda x: x.expand(3, *x.shape), lambda x: x.expand(3, x.shape[-1]),
    lambda x: x.expand(4, 3), lambda x: x.expand(3, 3), lambda x: x.expand(len(x), 3), lambda x: x.repeat(1, 2),
    lambda x: x.cumsum(0), lambda x: x.cumsum(-1), lambda x: x.softmax(0), lambda x: x.diagonal(),
    lambda x: torch.zeros_like(x), lambda x: torch.ones_like(x), lambda x: x.new_ones(x.shape[-1]),
    lambda x: x.new_zeros(3, 3), lambda x: x.new_ones(len(x)), lambda x: x.new_full((len(x), 3), 0.7),
    lambda x: x.detach(), lambda x: x * x.detach(), lambda x: x.movedim(0, -1), lambda x: x.swapaxes(0, 1),
]  # fmt: skip
TWO: list[Expression] = [
    torch.add, torch.sub, torch.mul, torch.add, torch.mul, lambda a, b: a / (2 + b * b), lambda a, b: a * torch.tanh(b),
    lambda a, b: torch.add(a, b, alpha=0.5), lambda a, b: torch.addcmul(a, a, b, value=0.3), lambda a, b: a - 2 * b,
    torch.mm, torch.matmul, torch.matmul, lambda a, b: a @ b.t(), lambda a, b: F.linear(a, b), lambda a, b: a @ b.mT,
    lambda a, b: torch.cat([a, b], -1), lambda a, b: torch.cat([a, b], 0), lambda a, b: torch.stack([a, b], -1),
    lambda a, b: torch.stack([a, b], 1), lambda a, b: torch.stack([a, b]), lambda a, b: a.expand_as(b),
    lambda a, b: a.expand_as(b) + b, lambda a, b: torch.where(a > 0, a, b), torch.maximum, torch.outer,
    lambda a, b: torch.addmm(a, b, b), lambda a, b: F.linear(b, a, a[0]), lambda a, b: a.view_as(b),
    lambda a, b: a.reshape(b.shape), lambda a, b: a.type_as(b), lambda a, b: a[..., :1] * b, lambda a, b: a[..., 0] * b,
    lambda a, b: torch.einsum("bi,ij->bj", a, b), lambda a, b: torch.einsum("bi,bi->b", a, b), torch.hypot,
    lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a + b.sum(-1, keepdim=True), lambda a, b: a * b.mean(-1),
]  # fmt: skip


def _write(a: torch.Tensor, part: Callable[[torch.Tensor], torch.Tensor], b: Any) -> torch.Tensor:
    part(a).copy_(b) if isinstance(b, torch.Tensor) else part(a).fill_(b)
    return a


IN_PLACE: list[Expression] = [
    lambda a, b: a.add_(b), lambda a, b: a.mul_(b), lambda a, b: a.sub_(b, alpha=2), lambda a, b: a.tanh_(),
    lambda a, b: _write(a, lambda x: x[..., 0], b), lambda a, b: _write(a, lambda x: x[..., :1], b),
    lambda a, b: _write(a, lambda x: x[..., 1:], b), lambda a, b: _write(a, lambda x: x, b),
    lambda a, b: _write(a, lambda x: x[..., -1], 0.3), lambda a, b: _write(a, lambda x: x[:1], b),
    lambda a, b: _write(a, lambda x: x[..., 0], b[..., 0]), lambda a, b: _write(a, lambda x: x[0], 0.2),
    lambda a, b: a[..., 0].mul_(b[..., 0]), lambda a, b: a[..., 1:].add_(b[..., :1]), lambda a, b: a.neg_(),
    lambda a, b: a.view(-1).mul_(2), lambda a, b: a.zero_(), lambda a, b: a.t().mul_(b), lambda a, b: a.div_(3),
    lambda a, b: a.unsqueeze(-1).add_(1), lambda a, b: a.squeeze().mul_(0.5), lambda a, b: a.sin_(),
]  # fmt: skip
MODES: list[Any] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
SHAPES = {
    (4, 3): [(3,), (1, 3), (), (4, 1), (4, 3), (3, 3), (4,), (1,), (1, 1)],
    (3, 3): [(3,), (1, 3), (), (3, 1), (3, 3), (3, 3), (1,)],
    (1, 3): [(3,), (1, 3), (), (1, 1), (3, 3), (1,)],
    (3, 1): [(3,), (1, 3), (), (1, 1), (3, 1), (1, 1), (3, 3), (1,)],
    (2, 2): [(2,), (1, 2), (), (2, 1), (2, 2)],
    (1, 1): [(1,), (), (1, 1), (2,), (3,)],
    (3,): [(3,), (), (3, 3), (1,), (1, 3), (3, 1)],
    (2, 3, 3): [(3,), (), (3, 3), (1, 3), (2, 1, 1), (2, 3, 1), (2, 3, 3), (3, 1), (2, 1, 3), (2, 3)],
    (2, 2, 2): [(2,), (), (2, 2), (2, 1, 1), (2, 2, 1), (2, 1)],
}  # fmt: skip


Steps = list[tuple[Expression, tuple[int, ...]]]


def field_of(steps: Steps, parameters: Values) -> Callable[..., torch.Tensor]:
    """The field that takes those steps and adds up all that is shaped like the state."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        values = [t, y, *parameters]
        for function, at in steps:
            values.append(function(*(values[i] for i in at)))
        total = 0 * y
        for value in values[2 + len(parameters) :]:
            total = total + value if value.shape == y.shape else total
        return total

    return field


def works(field: Callable[..., torch.Tensor], y: torch.Tensor, parameters: Values) -> bool:
    """Whether PyTorch can do all steps, and does not change what it was given."""
    t, y = torch.rand(()), y.clone().requires_grad_().view_as(y)
    try:
        out = field(t, y)
        torch.autograd.grad(out.sum(), [y, *parameters], allow_unused=True)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False
    return bool(out.isfinite().all() and (out.abs() < 1e3).all()) and all(x._version == 0 for x in (t, y, *parameters))


def random_steps(draw: random.Random, y: torch.Tensor, parameters: Values, length: int, mode: Any) -> Steps:
    """Steps that a program can say, or seems to be able to."""
    steps: Steps = []
    given = 2 + len(parameters)
    for _ in range(12 * length):
        count = given + len(steps)
        a, b = draw.choice([count - 1, draw.randrange(count), 1]), draw.randrange(count)
        kind = draw.random()
        if kind < 0.4:
            step = draw.choice(ONE), (a,)
        elif kind < 0.6 and a >= given:
            step = draw.choice(IN_PLACE), (a, b)
        else:
            step = draw.choice(TWO), ((a, b) if draw.random() < 0.5 else (b, a))
        field = field_of([*steps, step], parameters)
        if not works(field, y, parameters):
            continue
        try:
            with mode():
                lower(field, torch.tensor(0.3), y, ())
        except NotLowered:
            continue
        steps.append(step)
        if len(steps) == length:
            break
    return steps


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(25))
def test_what_is_a_program_equals_its_field(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    y, parameters = torch.rand(shape) + 0.2, [torch.randn(s).requires_grad_() for s in SHAPES[shape]]
    mode = MODES[seed % len(MODES)]
    field = field_of(random_steps(random.Random(seed), y, parameters, 3 + seed % 6, mode), parameters)
    with mode():
        lowered = lower(field, torch.tensor(0.3), y, ())
    if mode is not torch.enable_grad:
        lowered.tensors = [x.clone() for x in lowered.tensors]
    assert_equals_field(lowered, field, torch.tensor(0.5), y, parameters if mode is torch.enable_grad else None)
