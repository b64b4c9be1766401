"""`gradient="exact"` is float64 autograd through the accepted steps, whatever is kept and whatever is recomputed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from neuralode.errors import UsageError
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import SolverConfig, solve
from neuralode.ode.explicit import RungeKutta
from neuralode.ode.methods import METHODS, takes_fixed_steps
from neuralode.ode.tableaus import Tableau

EXPLICIT = sorted(name for name, method in METHODS.items() if isinstance(method, RungeKutta))
POLICIES: list[dict[str, Any]] = [
    {"checkpoint": "auto"}, {"checkpoint": "always"}, {"checkpoint": "never"}, {"checkpoint": 1}, {"checkpoint": 2},
    {"checkpoint": 5}, {"checkpoint": "auto", "memory_budget": 1}, {"checkpoint": "auto", "memory_budget": 4000},
]  # fmt: skip
ROUNDING = {"rtol": 1e-11, "atol": 1e-12}
SPANS = [(0.0, 0.37, 0.41, 1.3), (1.3, 0.6, 0.1)]

Field = Callable[..., torch.Tensor]


def name_of(policy: dict[str, Any]) -> str:
    return "-".join(map(str, policy.values()))


def mlp() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [5], time=True).double()


def start(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def settings(method: str) -> dict[str, Any]:
    """Several steps, none of which ends by chance at an output time."""
    if takes_fixed_steps(method):
        return {"method": method, "step_size": 0.11}
    tolerance = {"adaptive_heun": 1e-3, "rkc2": 1e-3, "fehlberg2": 1e-6, "bosh3": 1e-5}.get(method, 1e-9)
    return {"method": method, "rtol": tolerance, "atol": tolerance}


def frozen(method: str) -> dict[str, Any]:
    """Steps that do not depend on the state, so that finite differences see the grid on which the gradient is."""
    if takes_fixed_steps(method):
        return {"method": method, "step_size": 0.3}
    own = {"spectral_radius": 5.0} if method == "rkc2" else {}
    return {"method": method, "rtol": 1e8, "atol": 1e8, "options": {"first_step": 0.21, "ifactor": 1.2, **own}}


def replay(field: Field, y: torch.Tensor, ts: torch.Tensor, sizes: Sequence[float], tableau: Tableau,
           lands: bool) -> torch.Tensor:  # fmt: skip
    """The states at ts, by plain steps of these sizes.

    The grid begins at ts[0] (where it `lands` at every output, anew at each) and is rigid, but for the last step
    before such an end, which goes as far as that end.
    """
    values, last = ts.tolist(), len(ts) - 1
    direction = 1.0 if values[-1] > values[0] else -1.0
    outputs, anchor, time = [y], 0, values[0]
    for size in sizes:
        end = time + direction * size
        inside = [i for i in range(len(outputs), last + 1) if (values[i] - end) * direction < 1e-11]
        ends = bool(inside) and abs(values[inside[-1]] - end) < 1e-11 and (lands or inside[-1] == last)
        t = ts[anchor] + (time - values[anchor])
        h = ts[inside[-1]] - t if ends else torch.tensor(direction * size, dtype=torch.float64)
        k: list[torch.Tensor] = []
        for c, row in zip(tableau.c, tableau.a, strict=True):
            k.append(field(t + c * h, y + h * sum(a * slope for a, slope in zip(row, k, strict=True))))
        y1 = y + h * sum(b * slope for b, slope in zip(tableau.b, k, strict=True))
        for i in inside[:-1] if ends else inside:
            outputs.append(between(field, tableau, t, h, y, y1, k, (ts[i] - t) / h))
        if ends:
            outputs.append(y1)
            anchor = inside[-1] if lands else 0
        y, time = y1, values[inside[-1]] if ends else end
    return torch.stack(outputs)


def between(field: Field, tableau: Tableau, t: torch.Tensor, h: torch.Tensor, y0: torch.Tensor, y1: torch.Tensor,
            k: list[torch.Tensor], theta: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Dense output at t + θh: the method's polynomial, or the cubic Hermite one."""
    if tableau.interpolant:
        k = list(k)
        for c, row in zip(tableau.dense_c, tableau.dense_a, strict=True):
            k.append(field(t + c * h, y0 + h * sum(a * slope for a, slope in zip(row, k, strict=True))))
        weights = [sum(w * theta ** (i + 1) for i, w in enumerate(row)) for row in tableau.interpolant]
        return y0 + h * sum(w * slope for w, slope in zip(weights, k, strict=True))
    end = field(t + h, y1)
    return (
        (1 + 2 * theta) * (1 - theta) ** 2 * y0 + theta**2 * (3 - 2 * theta) * y1
        + h * (theta * (1 - theta) ** 2 * k[0] + theta**2 * (theta - 1) * end)
    )  # fmt: skip


def weighed(ys: torch.Tensor) -> torch.Tensor:
    """A loss in which every entry of every output counts differently."""
    flat = torch.view_as_real(ys).flatten() if ys.is_complex() else ys.flatten()
    return (flat.square() * torch.linspace(0.5, 1.5, len(flat), dtype=flat.dtype)).sum()


def assert_equal(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, **ROUNDING)


def problem() -> tuple[Field, list[torch.Tensor], torch.Tensor]:
    """A field with an argument, its parameters, and the argument."""
    net = mlp()
    return lambda t, y, gain: gain * net(t, y), list(net.parameters()), leaf(1.3)


@pytest.mark.parametrize("span", SPANS, ids=["forward", "reversed"])
@pytest.mark.parametrize("method", EXPLICIT)
def test_every_explicit_method_against_plain_steps(method: str, span: tuple[float, ...]) -> None:
    field, parameters, gain = problem()
    y0, t = start(), leaf(*span)
    inputs = [y0, t, gain, *parameters]
    solution = solve(field, y0, t, args=(gain,), engine="stepper", checkpoint="never", **settings(method))
    sizes = solution.stats.step_sizes
    assert len(sizes) >= 3
    tableau, lands = METHODS[method].tableau, not METHODS[method].interpolates
    plain = replay(lambda t, y: field(t, y, gain), y0, t, sizes, tableau, lands)
    torch.testing.assert_close(solution.ys, plain, **ROUNDING)
    wanted = torch.autograd.grad(weighed(plain), inputs)
    assert_equal(torch.autograd.grad(weighed(solution.ys), inputs), wanted)
    for policy in POLICIES:
        again = solve(field, y0, t, args=(gain,), engine="stepper", **policy, **settings(method))
        assert again.stats.step_sizes == pytest.approx(sizes, rel=1e-12)
        assert_equal(torch.autograd.grad(weighed(again.ys), inputs), wanted)


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("span", SPANS, ids=["forward", "reversed"])
@pytest.mark.parametrize("method", ["rkc2", "esdirk4"])
def test_methods_without_a_tableau_recompute_what_they_kept(
    method: str, span: tuple[float, ...], policy: dict[str, Any]
) -> None:
    field, parameters, gain = problem()
    y0, t = start(), leaf(*span)
    found = []
    for how in ({"checkpoint": "never"}, policy):
        ys = solve(field, y0, t, args=(gain,), **how, **settings(method)).ys
        found.append(torch.autograd.grad(weighed(ys), [y0, t, gain, *parameters]))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("checkpoint", ["always", "never", 2])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_against_finite_differences(method: str, checkpoint: Any) -> None:
    net = mlp()
    weight = next(net.parameters())

    def outputs(y0: torch.Tensor, t: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor) -> Any:
        parameters = {**dict(net.named_parameters()), next(iter(dict(net.named_parameters()))): weight}

        def field(t: torch.Tensor, y: torch.Tensor, gain: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return gain * functional_call(net, dict(zip(parameters, values, strict=True)), (t, y))

        args = (gain, *parameters.values())
        return solve(field, y0, t, args=args, checkpoint=checkpoint, **frozen(method)).ys[1:]

    inputs = (start(1), leaf(0.0, 0.35, 1.0), leaf(1.3), weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


def test_steps_that_no_output_reads_beyond_are_recomputed_too() -> None:
    # only the first outputs carry a cotangent: the gradient must not see the rest, nor miss its share of t
    net, y0, t = mlp(), start(), leaf(0.0, 0.2, 0.5, 2.0)
    found = []
    for checkpoint in ("never", "always", 2):
        ys = solve(net, y0, t, checkpoint=checkpoint).ys
        found.append(torch.autograd.grad(weighed(ys[1:3]), [y0, t, *net.parameters()]))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
    assert found[0][1][-1] == 0


class Pair(nn.Module):
    """A tuple state: a matrix and a vector that drive each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(3, 2).double()

    def forward(self, t: torch.Tensor, y: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, v = y
        return torch.tanh(self.a(x) + self.b(v)), -v * x.mean() * t.cos()


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_tuple_states(policy: dict[str, Any]) -> None:
    net, x, v, t = Pair(), start(), leaf(0.3, -0.8, 0.5), leaf(0.0, 0.4, 1.0)
    sources = [x, v, t, *net.parameters()]
    solution = solve(net, (x, v), t, **policy)

    def flat(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dx, dv = net(t, (y[:6].view(3, 2), y[6:]))
        return torch.cat([dx.flatten(), dv])

    packed = torch.cat([x.flatten(), v])
    plain = replay(flat, packed, t, solution.stats.step_sizes, METHODS["dopri5"].tableau, lands=False)
    ours = torch.cat([solution.ys[0].flatten(1), solution.ys[1]], 1)
    torch.testing.assert_close(ours, plain, **ROUNDING)
    assert_equal(torch.autograd.grad(weighed(ours), sources), torch.autograd.grad(weighed(plain), sources))


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
@pytest.mark.parametrize("method", ["dopri5", "rk4", "dopri8"])
def test_complex_states(method: str, policy: dict[str, Any]) -> None:
    rate = torch.tensor([0.3 - 1.1j, -0.2 + 0.7j], dtype=torch.complex128, requires_grad=True)
    real = leaf(0.4)
    z = torch.tensor([[0.5 + 0.2j, 1.0 - 0.3j]], dtype=torch.complex128, requires_grad=True)
    t, sources = leaf(0.0, 0.37, 1.0), [z, rate, real]

    def field(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return rate * z * (real * t).cos() - 0.1 * z * z.abs()

    solution = solve(field, z, t, **policy, **settings(method))
    tableau, lands = METHODS[method].tableau, not METHODS[method].interpolates
    plain = replay(field, z, t, solution.stats.step_sizes, tableau, lands)
    torch.testing.assert_close(solution.ys, plain, **ROUNDING)
    wanted = torch.autograd.grad(weighed(plain), [*sources, t])
    assert_equal(torch.autograd.grad(weighed(solution.ys), [*sources, t]), wanted)


def fields() -> dict[str, Callable[[], tuple[Field, list[torch.Tensor]]]]:
    """Fields of every kind, each with the leaves that it depends on."""

    def module() -> Any:
        net = mlp()
        return net, list(net.parameters())

    def closure() -> Any:
        net = mlp()
        return lambda t, y: 2 * net(t, y), list(net.parameters())

    def lambdas() -> Any:
        weight, bias = start(2), leaf(0.1, -0.2)
        return lambda t, y: torch.tanh(y @ weight + bias * t), [weight, bias]

    def method_of_a_module() -> Any:
        net = mlp()
        return net.forward, list(net.parameters())

    def shared() -> Any:
        net = mlp()
        gain = leaf(0.7)
        return lambda t, y: gain * net(t, y) + net(t, gain * y), [gain, *net.parameters()]

    return {f.__name__: f for f in (module, closure, lambdas, method_of_a_module, shared)}


@pytest.mark.parametrize("policy", POLICIES[1:], ids=name_of)
@pytest.mark.parametrize("kind", fields())
def test_fields_of_every_kind(kind: str, policy: dict[str, Any]) -> None:
    field, leaves = fields()[kind]()
    y0, t = start(), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    solution = solve(field, y0, t, **policy)
    plain = replay(field, y0, t, solution.stats.step_sizes, METHODS["dopri5"].tableau, lands=False)
    assert_equal(
        torch.autograd.grad(weighed(solution.ys), [y0, *leaves]), torch.autograd.grad(weighed(plain), [y0, *leaves])
    )


@pytest.mark.parametrize("checkpoint", ["never", "always", 3])
def test_a_leaf_that_the_field_uses_only_later_gets_its_gradient_or_is_refused(checkpoint: Any) -> None:
    early, late, y0 = leaf(0.4), leaf(-0.9), start()
    ys = solve(
        lambda t, y: early * y if t < 0.5 else late * y, y0, [0.0, 1.0], method="rk4", step_size=0.1,
        checkpoint=checkpoint,
    ).ys  # fmt: skip
    if checkpoint != "never":
        with pytest.raises(UsageError, match="without a gradient"):
            weighed(ys).backward()
        return
    weighed(ys).backward()
    assert early.grad.abs() > 1e-3
    assert late.grad.abs() > 1e-3


@pytest.mark.parametrize("policy", POLICIES, ids=name_of)
def test_functional_call_with_computed_parameters(policy: dict[str, Any]) -> None:
    net, y0, scale = mlp(), start(), leaf(0.8)
    block = ODEBlock(net, SolverConfig(method="rk4", step_size=0.1, **policy))
    own = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    sources = [y0, scale, *own.values()]
    final = functional_call(block, {name: scale * p for name, p in own.items()}, (y0,))
    found = torch.autograd.grad(weighed(final), sources)  # the module has its own parameters back by now

    inner = {name.removeprefix("field."): scale * p for name, p in own.items()}
    field = lambda t, y: functional_call(net, inner, (t, y))  # noqa: E731
    ts = torch.tensor([0.0, 1.0], dtype=torch.float64)
    plain = replay(field, y0, ts, [0.1] * 10, METHODS["rk4"].tableau, lands=False)[-1]
    assert_equal(found, torch.autograd.grad(weighed(plain), sources))
    assert all(p.grad is None for p in net.parameters())


COMPUTED = r"computed outside it.*args=\(\.\.\.\).*checkpoint='never'"


@pytest.mark.parametrize("how", [{"checkpoint": "always"}, {"checkpoint": 2}, {"memory_budget": 1},
                                 {"gradient": "adjoint"}], ids=name_of)  # fmt: skip
def test_a_tensor_computed_outside_is_refused_where_it_could_get_no_gradient(how: dict[str, Any]) -> None:
    root, y0 = start(2), start()
    weight = torch.tanh(root)
    with pytest.raises(UsageError, match=COMPUTED):
        solve(lambda t, y: y @ weight, y0, [0.0, 1.0], engine="stepper", **how)
    with pytest.raises(UsageError, match=COMPUTED):
        solve(lambda t, y, weights: y @ weights[0], y0, [0.0, 1.0], args=([weight],), engine="stepper", **how)
    with torch.no_grad():
        solve(lambda t, y: y @ weight, y0, [0.0, 1.0], engine="stepper", **how)  # nothing is lost here


def test_a_tensor_computed_outside_is_taken_as_an_argument_or_with_kept_graphs() -> None:
    root, y0 = start(2), start()
    found = []
    for checkpoint in ("always", "never"):
        weight = torch.tanh(root)
        ys = solve(lambda t, y, w: y @ w, y0, [0.0, 1.0], args=(weight,), checkpoint=checkpoint).ys
        found.append(torch.autograd.grad(weighed(ys), [y0, root]))
    weight = torch.tanh(root)
    ys = solve(lambda t, y: y @ weight, y0, [0.0, 1.0], checkpoint="never").ys
    found.append(torch.autograd.grad(weighed(ys), [y0, root]))
    assert_equal(found[0], found[1])
    assert_equal(found[2], found[1])


@pytest.mark.parametrize("method", ["rk4", "dopri5", "tsit5", "rkc2"])
def test_second_derivatives_with_kept_graphs(method: str) -> None:
    net = mlp()

    def final(y0: torch.Tensor, t: torch.Tensor, gain: torch.Tensor) -> Any:
        return solve(
            lambda t, y, g: g * net(t, y), y0, t, args=(gain,), checkpoint="never", **frozen(method)
        ).ys[1:]  # fmt: skip

    assert torch.autograd.gradgradcheck(final, (start(1), leaf(0.0, 0.35, 1.0), leaf(1.3)))


@pytest.mark.parametrize("checkpoint", ["always", 2])
def test_second_derivatives_are_refused_elsewhere(checkpoint: Any) -> None:
    y0 = start()
    ys = solve(mlp(), y0, [0.0, 1.0], engine="stepper", checkpoint=checkpoint).ys
    with pytest.raises(UsageError, match=r"second derivatives.*checkpoint='never'"):
        torch.autograd.grad(weighed(ys), y0, create_graph=True)


def test_a_second_backward_pass_gives_the_same_gradient() -> None:
    # as autograd has it for kept graphs with retain_graph=True
    net, y0 = mlp(), start()
    for policy in POLICIES:
        ys = solve(net, y0, [0.0, 0.5, 1.0], **policy).ys
        first, second = (torch.autograd.grad(weighed(ys), [y0, *net.parameters()], retain_graph=True) for _ in "12")
        assert_equal(second, first)


@pytest.mark.parametrize("policy", POLICIES[1:], ids=name_of)
def test_recomputing_happens_under_the_autocast_of_the_solve(policy: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = MLPField(2, [16])
    y0 = start().detach().float().requires_grad_()
    seen: list[Any] = []

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), net(t, y).dtype))
        return net(t, y).float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = solve(field, y0, [0.0, 1.0], method="rk4", step_size=0.1, **policy).ys
    forward = len(seen)
    torch.autograd.grad(weighed(ys), [y0, *net.parameters()])
    assert (len(seen) > forward) == (policy.get("checkpoint") != "never")
    assert set(seen) == {(True, torch.bfloat16)}
