"""Fields that are no programs: each is refused, and left as if it had not been called."""

from __future__ import annotations

import itertools
import math
import os
import random
import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neuralode.kernels.lower import NotLowered, lower
from tests.kernels.test_lower import Net, assert_equals_field, double, mlp

__all__ = ["double"]

W = torch.eye(3, dtype=torch.float64).mul_(2).requires_grad_()
U = (W.detach() * (1 + 2j)).requires_grad_()
Tensors = tuple[torch.Tensor, torch.Tensor]


class Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def without_gradient(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        gate = torch.tanh(y)
    return gate * y


def in_half(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (y @ W.float()).float()


def with_new_data(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = 1 * y
    z.data = torch.ones_like(y)
    return z


def hooked(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.tanh(y)
    z.register_hook(lambda gradient: 2 * gradient)
    return z


def hooked_node(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = torch.tanh(y)
    z.grad_fn.register_hook(lambda inputs, outputs: (2 * inputs[0],))
    return z


def spread_then_changed(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = 1 * y[:, :1]
    spread = x.expand_as(y)
    x.mul_(2)
    return 1 * spread


def forgiving(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    try:
        return y * y.max().item()
    except Exception:
        return y


@torch.jit.script
def scripted(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if bool(t > 0.35):
        return y
    return -y


FIELDS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "branch on the time": lambda t, y: y if t > 0.5 else -y,
    "branch on the state": lambda t, y: y if y.sum() > 0 else -y,
    "branch on all": lambda t, y: y if torch.equal(y, 2 * y) else -y,
    "branch on a constant": lambda t, y: y if W[0, 0] > 0 else -y,
    "where": lambda t, y: torch.where(y > 0, y, 2 * y),
    "mask": lambda t, y: y * (y > 0),
    "item": lambda t, y: y * t.item(),
    "float": lambda t, y: y * float(t),
    "int": lambda t, y: y * int(t),
    "list": lambda t, y: torch.tensor(y.tolist()),
    "numpy": lambda t, y: torch.from_numpy(y.detach().numpy() * 2),
    "array": lambda t, y: torch.from_numpy(y.detach().__array__() * 2),
    "dlpack": lambda t, y: torch.from_dlpack(y.detach()) * 2,
    "address": lambda t, y: y * y.data_ptr(),
    "text": lambda t, y: y * len(str(y)),
    "new tensor of a value": lambda t, y: y * torch.tensor(t),
    "caught refusal": forgiving,
    "script": scripted,
    "script within": lambda t, y: 2 * scripted(t, y),
    "compiled": torch.compile(lambda t, y: 2 * y, backend="eager"),
    "dropout": lambda t, y: F.dropout(y, 0.5),
    "noise": lambda t, y: y + torch.randn_like(y),
    "noise from a generator": lambda t, y: y + torch.rand(3, generator=torch.Generator().manual_seed(0)),
    "noise of Python": lambda t, y: y * random.random(),
    "noise of NumPy": lambda t, y: y * np.random.rand(),  # noqa: NPY002
    "shuffle": lambda t, y: y * torch.randperm(3),
    "state changed": lambda t, y: y.mul_(2),
    "part of the state changed": lambda t, y: y[:, :1].zero_() + y,
    "time changed": lambda t, y: y * t.add_(1),
    "constant changed": lambda t, y: y * torch.arange(3.0).add_(1),
    "out": lambda t, y: torch.tanh(y.detach(), out=torch.empty(4, 3)),
    "spread, then changed": spread_then_changed,
    "detached state": lambda t, y: y * y.detach(),
    "detached time": lambda t, y: y * t.detach(),
    "data": lambda t, y: y.data * y,
    "new data": with_new_data,
    "without gradient": without_gradient,
    "hook": hooked,
    "hook on a node": hooked_node,
    "other gradient": lambda t, y: Reversed.apply(torch.tanh(y)),
    "part of a conjugate": lambda t, y: torch.tanh(F.linear(y, U.mH.imag)),
    "requires_grad_": lambda t, y: torch.tanh(y).requires_grad_(),
    "convolution": lambda t, y: F.conv1d(y[:, None], W[:1, None], padding=1)[:, 0],
    "softmax over rows": lambda t, y: y.softmax(0),
    "mean of rows": lambda t, y: y - y.mean(0),
    "mean of rows, kept": lambda t, y: y - y.mean(0, keepdim=True),
    "sum of all": lambda t, y: y * y.sum(),
    "rows by rows": lambda t, y: y @ y.T @ y,
    "rows flipped": lambda t, y: y.flip(0),
    "rows rolled": lambda t, y: y.roll(1, 0),
    "rows accumulated": lambda t, y: y.cumsum(0),
    "one row for all": lambda t, y: y[:1] + y,
    "one row's number": lambda t, y: y[0, 0] * y,
    "rows taken": lambda t, y: y[torch.tensor([1, 0, 3, 2])],
    "rows in pairs": lambda t, y: y.reshape(2, 6).tanh().reshape(4, 3).reshape(3, 4).reshape(4, 3),
    "transposed": lambda t, y: y.t().reshape(4, 3),
    "normalised over rows": lambda t, y: F.batch_norm(y, None, None, training=True),
    "other precision": lambda t, y: y.float(),
    "too few features": lambda t, y: y[:, :2],
    "too many features": lambda t, y: torch.cat([y, y], dim=1),
    "too few rows": lambda t, y: t * torch.ones(3),
    "a number": lambda t, y: 0.0,
    "a tuple": lambda t, y: (y,),
    "nothing": lambda t, y: None,
    "part without features": lambda t, y: torch.cat([y, y[:, 3:]], dim=1),
}  # fmt: skip


def refused(field: Any, y: torch.Tensor | None = None) -> str:
    """The reason; neither time nor state have changed."""
    t, y = torch.tensor(0.3), torch.rand(4, 3) + 0.2 if y is None else y
    before = t.clone(), y.clone()
    with pytest.raises(NotLowered) as caught:
        lower(field, t, y, ())
    assert torch.equal(t, before[0])
    assert torch.equal(y, before[1])
    return str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_refused(name: str) -> None:
    assert refused(FIELDS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_a_count_before_the_refusal_is_taken_back(name: str) -> None:
    function, history = FIELDS[name], []
    field = Net(lambda self, t, y: (counted(self), function(t, y))[1])
    field.nfe = 5

    def counted(self: Any) -> None:
        self.nfe += 1
        history.append(self.nfe)

    refused(field)
    assert field.nfe == 5
    assert history == []


@pytest.mark.parametrize("rows", [1, 4])
def test_batch_norm_and_dropout(rows: int) -> None:
    norm = nn.BatchNorm1d(3)
    if rows > 1:
        refused(Net(lambda self, t, y: self.norm(y), norm=norm), torch.rand(rows, 3))
    refused(Net(lambda self, t, y: self.net(y), net=nn.Sequential(mlp(), nn.Dropout(0.1))), torch.rand(rows, 3))
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


def test_spectral_norm_in_training() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).train()
    before = layer.state_dict()["parametrizations.weight.0._u"].clone()
    refused(Net(lambda self, t, y: self.layer(y), layer=layer))
    assert torch.equal(layer.state_dict()["parametrizations.weight.0._u"], before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook", "register_full_backward_pre_hook"])  # fmt: skip
@pytest.mark.parametrize("held", [lambda net: net, lambda net: lambda t, y: net(y), lambda net: Held({"net": [net]})],
                         ids=["itself", "closed over", "in a dict"])  # fmt: skip
def test_hooks(register: str, held: Callable[[Any], Any]) -> None:
    net = mlp()
    getattr(net[1], register)(lambda *given: None)
    assert "hooks" in refused(held(net))


class Held:
    def __init__(self, members: dict[str, Any]):
        self.members = members

    def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.members["net"][0](y)


def test_compiled_modules() -> None:
    assert "compile" in refused(torch.compile(Net(lambda self, t, y: self.net(y), net=mlp()), backend="eager"))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_functions_within_are_run_as_they_are_written(backend: str, warm: bool) -> None:
    compiled = torch.compile(lambda t, y: torch.tanh(y) * t + y, backend=backend)
    t, y = torch.tensor(0.3), torch.rand(4, 3)
    if warm:
        compiled(t, y.clone().requires_grad_())
    assert_equals_field(lower(lambda t, y: compiled(t, y) - y, t, y, ()), lambda t, y: compiled(t, y) - y, t, y)


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in refused(lambda t, y: y)
    refused(in_half, torch.rand(4, 3, dtype=torch.float32))


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ZeroDivisionError, NotLowered])
def test_errors_of_the_field(error: type[Exception]) -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise error("my own")

    assert "my own" in refused(field)


@pytest.mark.parametrize(
    "function", [lambda w: F.linear, lambda w: lambda y, v: y @ v.t()], ids=["linear", "transpose"]
)
def test_the_same_memory_with_other_gradients(function: Any) -> None:
    product = function(None)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        twice = 2 * W
        views = [W, W.detach(), Reversed.apply(W), twice, Reversed.apply(twice), twice.detach()]
        transposes = [v.t() for v in views]
        for i, (view, transpose) in enumerate(zip(views, transposes, strict=True)):
            y = y + product((i + 1) * y, view) + y.cos() @ transpose
        return y

    t, y = torch.tensor(0.3), torch.rand(4, 3)
    assert_equals_field(lower(field, t, y, ()), field, t, y, [W])


@pytest.mark.parametrize(
    "held",
    [
        np.random.default_rng(0),
        random.Random(0),
        random.Random(0).random,
        itertools.count(),
        itertools.count().__next__,
    ],
    ids=["numpy", "python", "method of python's", "count", "method of a count"],
)
def test_what_gives_something_else_each_time(held: Any) -> None:
    assert "cannot be given back" in refused(Net(lambda self, t, y: y * 2, held=held))


@pytest.mark.parametrize("give", [lambda: time.time(), lambda: os.urandom(1)[0], lambda: secrets.randbelow(2)])
def test_clocks_and_dice(give: Any) -> None:
    assert "gives something else each time" in refused(lambda t, y: y if give() > 0 else -y)


@pytest.mark.parametrize("use", [
    lambda n: n % 7 == 3, lambda n: 20 <= n <= 1000, lambda n: n == 5, lambda n: (n // 10) % 2, lambda n: n > 5,
    lambda n: float(n) < 7, lambda n: f"{n}" == "8", lambda n: {8: 1}.get(n), lambda n: math.sin(n) > 0.9,
    lambda n: (n + 1) % 9 == 0, lambda n: not n, lambda n: -n == -8,
])  # fmt: skip
@pytest.mark.parametrize("start", [0, 0.0])
def test_a_count_that_decides_anything(use: Any, start: float) -> None:
    def count(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return y * (2 if use(self.n) else 1)

    net = Net(count, n=start)
    assert "makes use of a number" in refused(net)
    assert net.n == start
    assert type(net.n) is type(start)


def test_a_count_by_which_something_is_kept() -> None:
    def count(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.n = 1 + self.n
        if self.n % 10 == 0:
            self.log.append(self.n)
        return 2 * y

    net = Net(count, n=0, log=[])
    assert "makes use of a number" in refused(net)
    assert (net.n, net.log) == (0, [])


class Nested:
    def __init__(self, depth: int):
        self.inner, self.n = Nested(depth - 1) if depth else None, 0

    @property
    def last(self) -> Nested:
        return self.inner.last if self.inner else self


def increase_entry(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    self.held[700] += 1
    return 2 * y


def increase_last(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    self.held.last.n += 2
    return 2 * y


def test_state_that_lies_deep_or_among_much() -> None:
    for many in ([0.0] * 1000, dict.fromkeys(range(1000), 0), np.zeros(1000)):
        net = Net(increase_entry, held=many)
        assert "a call changes" in refused(net)
        assert net.held[700] == 0
    assert "a call changes 'n'" in refused(Net(increase_last, held=Nested(13)))
    for much in (Nested(100), [Nested(0) for _ in range(1000)], tuple(Nested(0) for _ in range(1000))):
        assert "more than can be looked at" in refused(Net(lambda self, t, y: 2 * y, held=much))


def test_a_torchscript_module_within() -> None:
    net = Net(lambda self, t, y: self.net(y), net=torch.jit.script(nn.Linear(3, 3)))
    assert "TorchScript" in refused(net)
    assert "TorchScript" in refused(lambda t, y: net.net(y))


def test_hooks_of_all_modules_before_their_backward_pass() -> None:
    handle = nn.modules.module.register_module_full_backward_pre_hook(lambda module, gradient: None)
    try:
        assert "hooks" in refused(mlp())
    finally:
        handle.remove()
