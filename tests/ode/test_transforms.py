"""Solves under the transforms of torch.func, and fields and blocks under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from neuralode.errors import UsageError
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import SolveError, SolverConfig, Status, solve

HOW = {
    "dopri5": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6},
    "tsit5": {"method": "tsit5", "rtol": 1e-6, "atol": 1e-6},
    "rk4": {"method": "rk4", "step_size": 0.1},
    "rkc2": {"method": "rkc2", "rtol": 1e-6, "atol": 1e-6},
    "esdirk4": {"method": "esdirk4", "rtol": 1e-6, "atol": 1e-6},
}
TWICE = [name for name in HOW if name != "esdirk4"]  # whose first derivatives are all there is
methods = pytest.mark.parametrize("method", HOW)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Transforms may take other steps than the plain solve: a batch shares them under vmap."""


def mlp() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [6]).double()


def starts(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def final(y0: torch.Tensor, method: str, field: Any = None, **kwargs: Any) -> Any:
    return solve(field or NET, y0, [0.0, 1.0], **{**HOW[method], **kwargs}).final


NET = mlp()


def by_autograd(method: str) -> torch.Tensor:
    y0 = starts().requires_grad_()
    (gradient,) = torch.autograd.grad(final(y0, method).square().sum(), y0)
    return gradient


def rotation(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([y[..., 1], -y[..., 0]], -1)


@pytest.mark.parametrize("method", TWICE)
def test_grad(method: str) -> None:
    found = grad(lambda y: final(y, method).square().sum())(starts())
    torch.testing.assert_close(found, by_autograd(method), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", TWICE)
def test_grad_by_the_parameters(method: str) -> None:
    net = mlp()
    own = dict(net.named_parameters())

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return final(starts(), method, lambda t, y: functional_call(net, parameters, (t, y))).square().sum()

    found = grad(loss)(own)
    wanted = torch.autograd.grad(final(starts(), method, net).square().sum(), list(own.values()))
    for a, b in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@methods
def test_vmap(method: str) -> None:
    net = mlp()
    found = vmap(lambda y: final(y, method, net))(starts(5))
    torch.testing.assert_close(found, torch.stack([final(y, method, net) for y in starts(5)]), **CLOSE)


@pytest.mark.parametrize("method", TWICE)
def test_vmap_of_grad(method: str) -> None:
    net = mlp()
    found = vmap(grad(lambda y: final(y, method, net).square().sum()))(starts(4))
    y0 = starts(4).requires_grad_()
    total = torch.stack([final(y, method, net).square().sum() for y in y0]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, y0)[0], **CLOSE)


@pytest.mark.parametrize("method", TWICE)
def test_grad_of_vmap(method: str) -> None:
    net = mlp()
    found = grad(lambda y: vmap(lambda row: final(row, method, net))(y).square().sum())(starts())
    torch.testing.assert_close(found, by_autograd(method), **CLOSE)


@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("method", TWICE)
def test_jacobians(method: str, transform: Callable[..., Any]) -> None:
    net, y0 = mlp(), starts()[0]
    found = transform(lambda y: final(y, method, net))(y0)
    wanted = torch.autograd.functional.jacobian(lambda y: final(y, method, net, checkpoint="never"), y0)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("method", TWICE)
def test_jvp(method: str) -> None:
    net, y0, direction = mlp(), starts(), torch.ones(3, 2, dtype=torch.float64)
    value, found = jvp(lambda y: final(y, method, net), (y0,), (direction,))
    torch.testing.assert_close(value, final(y0, method, net), **CLOSE)
    difference = (final(y0 + 1e-4 * direction, method, net) - final(y0 - 1e-4 * direction, method, net)) / 2e-4
    torch.testing.assert_close(found, difference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", TWICE)
def test_hessian(method: str) -> None:
    net, y0 = mlp(), starts()[0]
    found = hessian(lambda y: final(y, method, net).square().sum())(y0)
    slope = grad(lambda y: final(y, method, net).square().sum())
    difference = torch.stack([(slope(y0 + d) - slope(y0 - d)) / 2e-3 for d in 1e-3 * torch.eye(2).double()])
    torch.testing.assert_close(found, difference, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found, found.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian], ids=lambda f: f.__name__)
def test_derivatives_of_esdirk4_are_right_or_refused(transform: Callable[..., Any]) -> None:
    loss = [lambda y, method=method: final(y, method).square().sum() for method in ("esdirk4", "dopri5")]
    try:
        found = transform(loss[0])(starts())
    except UsageError as refusal:
        assert "'dopri5'" in str(refusal)  # noqa: PT017
    else:
        torch.testing.assert_close(found, transform(loss[1])(starts()), **CLOSE)


@pytest.mark.parametrize("method", TWICE)
def test_grad_by_the_times(method: str) -> None:
    t = torch.tensor([0.0, 0.53, 1.1], dtype=torch.float64)
    net = mlp()

    def loss(t: torch.Tensor) -> torch.Tensor:
        return solve(net, starts(), t, **HOW[method]).ys[1:].square().sum()

    leaf = t.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(grad(loss)(t), wanted, rtol=1e-9, atol=1e-10)


@methods
def test_vmap_over_the_parameters(method: str) -> None:
    rates = torch.tensor([-0.5, 0.3, 0.9], dtype=torch.float64)
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = vmap(lambda rate: final(y0, method, lambda t, y: rate * y))(rates)
    torch.testing.assert_close(found, rates.exp()[:, None] * y0, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrap", [vmap, grad], ids=["vmap", "grad"])
@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ({"checkpoint": "always"}, r"torch\.func.*checkpoint='never'"),
        ({"checkpoint": 3}, r"torch\.func.*checkpoint='never'"),
        ({"gradient": "adjoint"}, r"torch\.func.*gradient='exact'"),
        ({"per_sample": True}, r"torch\.func.*per_sample"),
    ],
    ids=["always", "number", "adjoint", "per_sample"],
)
def test_what_does_not_work_inside_a_transform_is_refused(wrap: Any, how: dict[str, Any], remedy: str) -> None:
    net = mlp()
    with pytest.raises(UsageError, match=remedy):
        wrap(lambda y: final(y, "dopri5", net, **how).square().sum())(starts()[None].squeeze(0))


def tangent(how: dict[str, Any], by: str, rate: torch.Tensor) -> torch.Tensor:
    """The derivative along the start, or along `rate`, in forward mode outside torch.func; the net wants gradients."""
    with forward_ad.dual_level():
        y0 = starts()
        if by == "start":
            y0 = forward_ad.make_dual(y0, torch.ones_like(y0))
        else:
            rate = forward_ad.make_dual(rate, torch.ones_like(rate))
        ys = solve(lambda t, y: rate * NET(t, y), y0, [0.0, 0.4, 1.0], **how).ys
        return forward_ad.unpack_dual(ys).tangent


@pytest.mark.parametrize("by", ["start", "rate"])
@methods
def test_forward_mode_outside_torch_func(method: str, by: str) -> None:
    rate, y0 = torch.tensor(1.3, dtype=torch.float64), starts()

    def moved(by_how_much: torch.Tensor) -> torch.Tensor:
        start, factor = (y0 + by_how_much, rate) if by == "start" else (y0, rate + by_how_much)
        how = {**HOW[method], "checkpoint": "never"}
        return solve(lambda t, y: factor * NET(t, y), start, [0.0, 0.4, 1.0], **how).ys

    wanted = torch.autograd.functional.jacobian(moved, torch.zeros((), dtype=torch.float64))
    for memory in ({}, {"memory_budget": 0}):
        torch.testing.assert_close(tangent({**HOW[method], **memory}, by, rate), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("by", ["start", "rate"])
@pytest.mark.parametrize(
    "how",
    [
        {"checkpoint": "always"},
        {"checkpoint": 3},
        {"gradient": "adjoint"},
        {"gradient": "adjoint", "method": "implicit_adams", "step_size": 0.1},
    ],
    ids=str,
)
def test_forward_mode_is_refused_where_tangents_would_be_lost(how: dict[str, Any], by: str) -> None:
    with pytest.raises(UsageError, match=r"forward-mode.*(checkpoint='never'|gradient='exact')"):
        tangent({**HOW["dopri5"], **how}, by, torch.tensor(1.3, dtype=torch.float64))


@methods
def test_nan_inside_vmap_is_a_failure(method: str) -> None:
    y0 = starts()
    y0[1, 0] = torch.nan
    with pytest.raises(SolveError) as caught:
        vmap(lambda y: final(y, method, rotation))(y0)
    assert caught.value.status is Status.NON_FINITE
    assert method in str(caught.value)


def test_nan_inside_vmap_of_grad_is_a_failure() -> None:
    y0 = starts()
    y0[1, 0] = torch.nan
    with pytest.raises(SolveError):
        vmap(grad(lambda y: final(y, "dopri5", rotation).sum()))(y0)


def test_too_many_steps_inside_vmap_is_a_failure() -> None:
    with pytest.raises(SolveError, match="max_steps"):
        vmap(lambda y: final(y, "dopri5", lambda t, y: -1000 * y, max_steps=5))(starts())


def test_vmap_takes_the_steps_of_its_hardest_sample() -> None:
    rates = torch.tensor([1.0, 30.0], dtype=torch.float64)
    steps: list[int] = []

    def run(rate: torch.Tensor) -> Any:
        solution = solve(lambda t, y: torch.stack([y[1], -rate * rate * y[0]]), one, [0.0, 1.0], rtol=1e-6, atol=1e-6)
        steps.append(solution.stats.accepted)
        return solution.final[0]

    one = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = vmap(run)(rates)
    torch.testing.assert_close(found, rates.cos(), rtol=1e-3, atol=1e-3)
    run(rates[1])
    assert 0.8 * steps[1] <= steps[0] <= 2 * steps[1]


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Counts the graphs that torch.compile has made in this test."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("how", [{"method": "rk4", "step_size": 0.05}, {"rtol": 1e-4}, {"method": "tsit5"}], ids=str)
def test_a_compiled_field_is_not_compiled_again_from_step_to_step(graphs: Callable[[], int], how: Any) -> None:
    net = mlp()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    y0 = starts().requires_grad_()
    ys = solve(compiled, y0, [0.0, 1.0], **how, checkpoint="never").ys
    plain = solve(net, y0, [0.0, 1.0], **how, checkpoint="never").ys
    torch.testing.assert_close(ys, plain, rtol=1e-12, atol=1e-12)
    # with gradients and, for the first step's size, without; y0 is a leaf and the stages are not
    first = graphs()
    assert 1 <= first <= 3
    for again in ({"rtol": 1e-7, "atol": 1e-7}, {"rtol": 1e-3}):
        solve(compiled, starts().requires_grad_(), [0.0, 2.0], checkpoint="never", **{**how, **again})
    assert graphs() == first


@pytest.mark.parametrize("checkpoint", ["always", "never", 2, "auto"])
def test_gradients_of_a_compiled_field(graphs: Callable[[], int], checkpoint: Any) -> None:
    net = mlp()
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for field in (net, compiled):
        y0 = starts().requires_grad_()
        ys = solve(field, y0, [0.0, 0.4, 1.0], method="rk4", step_size=0.1, checkpoint=checkpoint).ys
        found.append(torch.autograd.grad(ys.square().sum(), [y0, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert 1 <= graphs() <= 5


def test_esdirk4_on_compiled_code_whose_graphs_serve_one_product_each(graphs: Callable[[], int]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for inner in (net, compiled):
        y0 = starts().requires_grad_()
        inner(y0).sum().backward()  # what compiled code does first settles it: from now on it frees what it saved
        ys = solve(lambda t, y, inner=inner: inner(y) * t.cos(), y0, [0.0, 0.4, 1.0], **HOW["esdirk4"]).ys
        found.append([ys, *torch.autograd.grad(ys.square().sum(), [y0, *net.parameters()])])
    with pytest.raises(RuntimeError, match="donated buffers"):
        torch.autograd.grad(compiled(y0).sum(), y0, retain_graph=True)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_a_compiled_model_gives_the_same_numbers_without_warnings(graphs: Callable[[], int], gradient: str) -> None:
    torch.manual_seed(0)
    block = ODEBlock(MLPField(4, [8]), SolverConfig(gradient=gradient))
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), block, torch.nn.Linear(4, 1)).double()
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "Guards may run slower")  # the compiler's, on Python 3.13.0
        for network in (model, torch.compile(model, backend="aot_eager")):
            y = network(starts())
            found.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))])
            network(starts(7))
    assert [str(warning.message) for warning in said] == []
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert graphs() == 2, "one graph for each of the two batch sizes"


def test_a_compiled_model_does_not_compile_again_from_call_to_call(graphs: Callable[[], int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), ODEBlock(MLPField(2, [8])), torch.nn.Linear(2, 1))
    compiled = torch.compile(model, backend="eager")
    y0 = starts().float()
    compiled(y0).sum().backward()
    first = graphs()
    for _ in range(4):
        compiled(torch.randn_like(y0)).sum().backward()
    assert graphs() == first
