"""Fields in the forms that people write them, as programs: each equals its field at other states and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from neuralode.kernels.lower import Lowered, lower
from neuralode.nn.fields import ACTIVATIONS, LotkaVolterraField, MLPField

Field = Callable[..., Any]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def rows_of(state: Any) -> torch.Tensor:
    """A state, or what a field makes of it, as the rows of a program."""
    if isinstance(state, tuple | list):
        return torch.cat([part.reshape(len(part), -1) for part in state], dim=1)
    return state.reshape(-1, state.shape[-1]) if state.dim() else state.reshape(1, 1)


def elsewhere(state: Any) -> Any:
    """Another state of the same shapes, which wants a gradient."""
    if isinstance(state, tuple):
        return tuple(elsewhere(part) for part in state)
    return (torch.rand_like(state) + 0.2).requires_grad_()


def gradients(outputs: torch.Tensor, inputs: list[torch.Tensor], weights: torch.Tensor) -> list[torch.Tensor]:
    if not outputs.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad((outputs * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_equals_field(lowered: Lowered, field: Field, t: torch.Tensor, y: Any, parameters: Any = (),
                        args: tuple[Any, ...] = ()) -> None:  # fmt: skip
    """A program agrees with its field at another time and state, in its values and, given parameters, in gradients."""
    t, y = elsewhere(t), elsewhere(y)
    found = lowered.program(t, rows_of(y), lowered.tensors)
    expected = rows_of(field(t, y, *args))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if parameters is None:  # lowered without gradients
        return
    weights = torch.randn_like(expected)
    inputs = [t, *(y if isinstance(y, tuple) else (y,)), *parameters]
    for a, b in zip(gradients(found, inputs, weights), gradients(expected, inputs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def check(field: Field, y: Any, parameters: Any = (), t: torch.Tensor | None = None,
          args: tuple[Any, ...] = ()) -> None:  # fmt: skip
    t = torch.tensor(0.3) if t is None else t
    assert_equals_field(lower(field, t, y, args), field, t, y, list(parameters), args)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Net(nn.Module):
    """A field that is a module around a function of (module, t, y)."""

    def __init__(self, function: Callable[..., torch.Tensor], **members: Any):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(self, t, y)


def mlp(inputs: int = 3, outputs: int = 3, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), activation or nn.Tanh(), nn.Linear(8, outputs))


class Sin(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


LAYERS = {
    **ACTIVATIONS, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid, "sin": Sin,
    "relu in place": lambda: nn.ReLU(inplace=True), "softplus(2, 5)": lambda: nn.Softplus(2, 5),
    "elu(0.5)": lambda: nn.ELU(0.5), "identity": nn.Identity, "selu": nn.SELU, "celu": lambda: nn.CELU(0.5),
    "gelu by tanh": lambda: nn.GELU("tanh"), "mish": nn.Mish, "log of a sigmoid": nn.LogSigmoid,
    "layer norm": lambda: nn.LayerNorm(8), "layer norm without bias": lambda: nn.LayerNorm(8, bias=False),
    "plain layer norm": lambda: nn.LayerNorm(8, eps=0.1, elementwise_affine=False), "rms norm": lambda: nn.RMSNorm(8),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 3, 8, 5])
def test_networks(name: str, rows: int) -> None:
    net = mlp(activation=LAYERS[name]())
    check(lambda t, y: net(y), torch.randn(rows, 3), net.parameters())


@pytest.mark.parametrize("settings", [{}, {"time": True}, {"power": 3}, {"time": True, "hidden": (5, 4, 3)}])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 3), (5, 3), (5, 2, 3)])
def test_own_networks(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    field = MLPField(3, **{"hidden": (8,), **settings})
    check(field, torch.randn(shape), field.parameters())


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 2), (5, 2), (2, 3, 2)])
def test_own_lotka_volterra(shape: tuple[int, ...]) -> None:
    field = LotkaVolterraField()
    check(field, torch.rand(shape), field.parameters())


def concat_squash(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return self.layer(y) * torch.sigmoid(self.gate(t.view(1, 1))) + self.bias(t.view(1, 1))


def normed(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return self.out(torch.tanh(self.net(y)))


def embedded(self: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    angles = t * self.frequencies
    features = torch.cat([angles.sin(), angles.cos()])
    return self.net(torch.cat([y, features.expand(len(y), -1)], dim=-1))


def normal_layer(norm: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(normed, net=norm(nn.Linear(3, 6)), out=norm(nn.Linear(6, 3))).eval()


def with_time(join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda self, t, y: self.net(join(t, y)), net=mlp(4))


def layer(function: Callable[..., torch.Tensor]) -> Callable[[], nn.Module]:
    """A field of y [B, 3] with parameters of every usual shape."""
    members = {"W": (3, 3), "b": (3,), "row": (1, 3), "number": ()}
    return lambda: Net(function, mask=torch.ones(3, 3).tril(), net=mlp(),
                       **{name: parameter(*shape) for name, shape in members.items()})  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "torchdiffeq's demo": layer(lambda self, t, y: self.net(y**3)),
    "true spiral": layer(lambda self, t, y: torch.mm(y**3, self.W)),
    "matmul": layer(lambda self, t, y: y @ self.W.t() @ self.W),
    "einsum-free transposes": layer(lambda self, t, y: y @ self.W.T + y @ self.W.detach().T + F.linear(y, self.W)),
    "a matrix with and without its gradient": layer(lambda self, t, y: two_transposes(self.W, y)),
    "masked": layer(lambda self, t, y: F.linear(y, self.W * self.mask, self.b)),
    "skew": layer(lambda self, t, y: F.linear(y, self.W - self.W.T)),
    "residual": layer(lambda self, t, y: y + self.net(y)),
    "gated": layer(lambda self, t, y: self.net(y) * torch.sigmoid(F.linear(y, self.W, self.b))),
    "decay": layer(lambda self, t, y: -y * F.softplus(self.b) + self.row * torch.cos(t) - self.number / (1 + y * y)),
    "scaled by time": layer(lambda self, t, y: torch.exp(-t) * self.net(y) + t * self.b + (1 - t) * self.row),
    "alpha": layer(lambda self, t, y: torch.add(y, self.b, alpha=2).sub(self.W[0] * y, alpha=0.5)),
    "reversed difference": layer(lambda self, t, y: 2 - y - torch.rsub(y, self.b, alpha=3)),
    "softened root": layer(lambda self, t, y: (y * y + 1).sqrt() + (y**2 + 1).rsqrt() + 1 / (1 + y.abs())),
    "addcmul": layer(lambda self, t, y: torch.addcmul(y, self.b, y, value=0.3).addcdiv(y, 2 + y * y, value=2)),
    "mean free": layer(lambda self, t, y: y - y.mean(-1, keepdim=True) + y.sum(dim=1, keepdim=True) * self.b),
    "norm": layer(lambda self, t, y: y * (1 - (y * y).sum(-1)).unsqueeze(-1)),
    "powers of numbers": layer(lambda self, t, y: 2**y - torch.exp2(self.net(y)) + 0.3 ** (t * y)),
    "gated linear unit": layer(lambda self, t, y: F.glu(torch.cat([self.net(y), self.W[0] * y], -1))),
    "gates of one half": layer(lambda self, t, y: F.glu(torch.cat([y, y[:, 1:], self.net(y)], -1)[:, 1:7])),
    "norm of what broadcasts": layer(lambda self, t, y: F.layer_norm(y + self.b, (3,), self.b, self.W[0])),
    "chunks": layer(lambda self, t, y: torch.cat([torch.chunk(y, 3, -1)[i] * self.W[i, i] for i in (2, 0, 1)], -1)),
    "split": layer(lambda self, t, y: torch.cat(tuple(reversed(y.split([1, 2], dim=-1))), dim=-1)),
    "rows one by one": layer(lambda self, t, y: torch.stack([self.W[i] @ self.b * y[:, i] for i in range(3)], 1)),
    "weight norm": normal_layer(parametrizations.weight_norm),
    "spectral norm": normal_layer(parametrizations.spectral_norm),
    "orthogonal": normal_layer(parametrizations.orthogonal),
    "t * ones": with_time(lambda t, y: torch.cat([y, t * torch.ones(len(y), 1)], dim=1)),
    "t * ones_like": with_time(lambda t, y: torch.cat([torch.ones_like(y[:, :1]) * t, y], dim=-1)),
    "t.expand": with_time(lambda t, y: torch.cat([y, t.expand(len(y), 1)], dim=-1)),
    "t.view.expand": with_time(lambda t, y: torch.cat([y, t.view(1, 1).expand(y.shape[0], 1)], dim=-1)),
    "t.reshape.repeat-free": with_time(lambda t, y: torch.cat([y, t.reshape(1, 1) + 0 * y[:, :1]], dim=-1)),
    "full_like + t": with_time(lambda t, y: torch.hstack([y, torch.full_like(y[:, :1], 0.0) + t])),
    "a number in single precision": layer(lambda self, t, y: y * torch.full((3,), 0.1, dtype=torch.float32)),
    "time written in": with_time(lambda t, y: written(t, y)),
    "concat squash": lambda: Net(concat_squash, layer=nn.Linear(3, 3), gate=nn.Linear(1, 3),
                                 bias=nn.Linear(1, 3, bias=False)),
    "time embedding": lambda: Net(embedded, frequencies=torch.arange(1.0, 5.0), net=mlp(11)),
    "network of the time": lambda: Net(lambda self, t, y: self.net(t.view(1)) * y, net=mlp(1)),
}  # fmt: skip


def two_transposes(w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    learned, fixed = w.t(), w.detach().t()
    return y @ learned + torch.tanh(y) @ fixed


def written(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    wide = y.new_zeros(len(y), 4)
    wide[:, :3] = y
    wide[:, 3] = t
    return wide


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_modules(name: str, rows: int) -> None:
    field = NETS[name]()
    check(field, torch.randn(rows, 3), field.parameters())


def lorenz_stacked(t: torch.Tensor, y: torch.Tensor, s: Any, r: Any, b: Any) -> torch.Tensor:
    x, v, z = y[..., 0], y[..., 1], y[..., 2]
    return torch.stack([s * (v - x), x * (r - z) - v, x * v - b * z], dim=-1)


def lorenz_unbound(t: torch.Tensor, y: torch.Tensor, s: Any, r: Any, b: Any) -> torch.Tensor:
    x, v, z = y.unbind(-1)
    return torch.stack((s * (v - x), x * (r - z) - v, x * v - b * z), -1)


def lorenz_written(t: torch.Tensor, y: torch.Tensor, s: Any, r: Any, b: Any) -> torch.Tensor:
    dy = torch.empty_like(y)
    dy[..., 0] = s * (y[..., 1] - y[..., 0])
    dy[..., 1] = y[..., 0] * (r - y[..., 2]) - y[..., 1]
    dy[..., 2] = y[..., 0] * y[..., 1] - b * y[..., 2]
    return dy


def lorenz_added_up(t: torch.Tensor, y: torch.Tensor, s: Any, r: Any, b: Any) -> torch.Tensor:
    dy = torch.zeros_like(y)
    dy[..., :1] += s * (y[..., 1:2] - y[..., :1])
    dy[..., 1] += y[..., 0] * (r - y[..., 2])
    dy[..., 1] -= y[..., 1]
    dy[..., 2] = y[..., 0] * y[..., 1]
    dy[..., 2].sub_(b * y[..., 2])
    return dy


def lorenz_joined(t: torch.Tensor, y: torch.Tensor, s: Any, r: Any, b: Any) -> torch.Tensor:
    x, v, z = torch.split(y, 1, dim=-1)
    return torch.cat([s * (v - x), x * (r - z) - v, x * v - b * z], dim=-1)


@pytest.mark.parametrize(
    "field", [lorenz_stacked, lorenz_unbound, lorenz_written, lorenz_added_up, lorenz_joined], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 3), (5, 3), (2, 4, 3)])
def test_lorenz(field: Field, learned: bool, shape: tuple[int, ...]) -> None:
    args = tuple(parameter() for _ in range(3)) if learned else (10.0, 28, 8 / 3)
    check(field, torch.randn(shape), args if learned else (), args=args)


def van_der_pol(t: torch.Tensor, y: torch.Tensor, mu: Any) -> torch.Tensor:
    x, v = y[:, 0], y[:, 1]
    return torch.stack([v, mu * (1 - x**2) * v - x], dim=1)


def van_der_pol_wide(t: torch.Tensor, y: torch.Tensor, mu: Any) -> torch.Tensor:
    x, v = y[:, :1], y[:, 1:]
    return torch.cat([v, mu * (1 - x.pow(2)) * v - x], dim=1)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(
    ("field", "shape"),
    [(van_der_pol, ()), (van_der_pol, ("rows",)), (van_der_pol_wide, ()), (van_der_pol_wide, ("rows", 1))],
)
def test_stiffness_of_each_sample(field: Field, shape: tuple[Any, ...], rows: int) -> None:
    mu = parameter(*(rows if n == "rows" else n for n in shape))
    check(field, torch.randn(rows, 2), [mu], args=(mu,))
    check(field, torch.randn(rows, 2), args=(2.5,))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_time_of_each_sample(rows: int) -> None:
    net = mlp(4)
    check(lambda t, y: net(torch.cat([y, t], -1)) * torch.cos(t) + t, torch.randn(rows, 3), net.parameters(),
          t=torch.rand(rows, 1))  # fmt: skip


def test_state_without_dimensions() -> None:
    rate = parameter()
    check(lambda t, y: rate * y * (1 - y) + torch.sin(t), torch.tensor(0.4), [rate])


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_parts(rows: int) -> None:
    net = mlp(3, 2)

    def field(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        y, z, cost = state
        dy = net(torch.cat([y, z], dim=1))
        return dy, t * z, (dy**2).sum(1) + cost

    check(field, (torch.randn(rows, 2), torch.randn(rows, 1), torch.zeros(rows)), net.parameters())


def test_functional_call() -> None:
    net = mlp()
    weights = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    check(lambda t, y: functional_call(net, weights, (y,)), torch.randn(4, 3), weights.values())


def test_equal_fields_share_a_program() -> None:
    first, second = (lower(MLPField(3), torch.tensor(0.0), torch.randn(4, 3), ()) for _ in range(2))
    assert first.program is second.program
    assert math.prod(first.dy.shape) == 12  # type: ignore[union-attr]
