"""What the user changes between a solve and its gradient is noticed, or does no harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from neuralode.errors import UsageError
from neuralode.kernels.library import library, why_not
from neuralode.ode import solve
from tests.ode.test_exact_gradient import assert_equal, leaf, mlp, start, weighed

needs_kernels = pytest.mark.skipif(library() is None, reason=why_not())
AGAIN = {"always": {"checkpoint": "always"}, "some": {"checkpoint": 2}, "budget": {"memory_budget": 1},
         "adjoint": {"gradient": "adjoint"}}  # fmt: skip
"""Ways that evaluate the field again in the backward pass."""
KEPT = {"never": {"checkpoint": "never"}, "always": {"checkpoint": "always"}, "some": {"checkpoint": 2},
        "adjoint": {"gradient": "adjoint"}}  # fmt: skip


@pytest.mark.parametrize("how", KEPT.values(), ids=KEPT)
def test_the_start_changed_in_place_is_noticed_or_does_no_harm(how: dict[str, Any]) -> None:
    net, y0 = mlp(), start().detach().clone()
    wanted = torch.autograd.grad(weighed(solve(net, y0, [0.0, 1.0], **how).ys), list(net.parameters()))
    ys = solve(net, y0, [0.0, 1.0], **how).ys
    y0.mul_(2)
    try:
        found = torch.autograd.grad(weighed(ys), list(net.parameters()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    assert_equal(found, wanted)


@pytest.mark.parametrize("how", KEPT.values(), ids=KEPT)
def test_a_parameter_changed_in_place_is_noticed(how: dict[str, Any]) -> None:
    net = mlp()
    ys = solve(net, start(), [0.0, 1.0], **how).ys
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighed(ys).backward()


@pytest.mark.parametrize("how", KEPT.values(), ids=KEPT)
def test_an_argument_changed_in_place_is_noticed(how: dict[str, Any]) -> None:
    rate, scale = leaf(0.5), torch.ones(2, dtype=torch.float64)
    ys = solve(lambda t, y, scale: rate * y * scale, start(), [0.0, 1.0], args=(scale,), **how).ys
    scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighed(ys).backward()


@pytest.mark.parametrize("checkpoint", ["never", "always", 2])
def test_a_module_given_other_parameters_since_keeps_the_gradient_of_the_solve(checkpoint: Any) -> None:
    net, y0 = mlp(), start()
    old = dict(net.named_parameters())
    ys = solve(net, y0, [0.0, 1.0], checkpoint=checkpoint).ys
    wanted = torch.autograd.grad(weighed(solve(net, y0, [0.0, 1.0], checkpoint="never").ys), list(old.values()))
    for name in old:
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, nn.Parameter(torch.zeros_like(old[name])))
    assert_equal(torch.autograd.grad(weighed(ys), list(old.values())), wanted)


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_other_memory_of_a_parameter_is_noticed(how: dict[str, Any]) -> None:
    net = mlp()
    ys = solve(net, start(), [0.0, 1.0], engine="stepper", **how).ys
    for parameter in net.parameters():
        parameter.data = parameter.data * 2
    with pytest.raises(UsageError, match="changed between the solve and its gradient"):
        weighed(ys).backward()


@pytest.mark.parametrize("engine", [pytest.param("fused", marks=needs_kernels), "stepper"])
def test_changes_that_hooks_hide(engine: str) -> None:
    net = mlp()
    with save_on_cpu():
        ys = solve(net, start(), [0.0, 1.0], engine=engine, checkpoint="always").ys
    wanted = torch.autograd.grad(weighed(solve(net, start(), [0.0, 1.0]).ys), list(net.parameters()))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    if engine == "stepper":
        with pytest.raises(UsageError, match="changed between the solve and its gradient"):
            weighed(ys).backward()
        return
    assert_equal(torch.autograd.grad(weighed(ys), list(net.parameters())), wanted)


@needs_kernels
@pytest.mark.parametrize("change", [
    lambda net: net.float(), lambda net: [setattr(p, "data", p.data * 3) for p in net.parameters()],
], ids=["type", "values"])  # fmt: skip
def test_the_kernels_keep_what_the_parameters_were(change: Any) -> None:
    net, y0 = mlp(), start()
    wanted = torch.autograd.grad(weighed(solve(net, y0, [0.0, 1.0], engine="fused").ys), list(net.parameters()))
    ys = solve(net, y0, [0.0, 1.0], engine="fused").ys
    change(net)
    weighed(ys).backward()
    assert_equal([parameter.grad for parameter in net.parameters()], wanted)


@pytest.mark.parametrize("what", ["context", "buffer", "number"])
@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_another_field_since_is_noticed(what: str, how: dict[str, Any]) -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.context, self.number = mlp(), torch.zeros(2).double(), 1.0
            self.register_buffer("buffer", torch.zeros(2).double())

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.net(t, y) + self.context + self.buffer) * self.number

    field = Steered()
    ys = solve(field, start(), [0.0, 1.0], engine="stepper", **how).ys
    if what == "context":
        field.context = torch.ones(2).double()
    elif what == "buffer":
        field.buffer.add_(1)
    else:
        field.number = 2.0
    with pytest.raises(UsageError, match="changed between the solve and its gradient"):
        weighed(ys).backward()


@pytest.mark.parametrize("kind", ["buffer", "frozen", "memory"])
@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_what_only_the_first_steps_read_is_noticed(how: dict[str, Any], kind: str) -> None:
    class Kicked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, kick = mlp(), torch.ones(2).double()
            if kind == "frozen":
                self.kick = nn.Parameter(kick, requires_grad=False)
            else:
                self.register_buffer("kick", kick)

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(t, y) * (self.kick if t < 0.4 else 1.0)

    field = Kicked()
    ys = solve(field, start(), [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper", **how).ys
    if kind == "memory":
        field.kick.data = torch.zeros(2).double()
    else:
        field.kick.mul_(3)
    with pytest.raises(UsageError, match="changed between the solve and its gradient"):
        weighed(ys).backward()


class Averaging(nn.Module):
    """Keeps running averages and a count, in two ways: with and without a trace in the count of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = mlp(), nn.BatchNorm1d(2, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(t, self.norm(y))


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("checkpoint", ["always", 2])
def test_steps_that_are_recomputed_do_not_count_again(checkpoint: Any, closure: bool) -> None:
    found = []
    for policy in ("never", checkpoint):
        field = Averaging()
        called = (lambda t, y, field=field: field(t, y)) if closure else field
        ys = solve(called, start(), [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper", checkpoint=policy).ys
        solve(field, start() + 1, [0.0, 1.0], method="rk4", step_size=0.1, engine="stepper")  # it goes on counting
        before = [buffer.clone() for buffer in field.buffers()]
        weighed(ys).backward()
        assert_equal(list(field.buffers()), before)
        found.append([parameter.grad for parameter in field.parameters()])
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("how", AGAIN.values(), ids=AGAIN)
def test_a_module_of_the_field_that_is_used_elsewhere_does_no_harm(how: dict[str, Any]) -> None:
    class Whole(nn.Module):
        """The dynamics, and a decoder that it is not made of."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.decoder = mlp(), nn.BatchNorm1d(2, dtype=torch.float64)

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.net(t, y)

    field = Whole()
    final = solve(field, start(), [0.0, 1.0], engine="stepper", **how).final
    weighed(field.decoder(final)).backward()
    assert field.decoder.num_batches_tracked == 1
    assert all(parameter.grad is not None for parameter in field.parameters())


def test_a_field_that_settles_as_it_is_evaluated_is_not_taken_for_another() -> None:
    class Settling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()
            self.register_buffer("estimate", torch.zeros(()).double())

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            self.estimate += 0.01 * (1 - self.estimate)  # as the power iteration of a spectral norm
            return self.net(t, y) * self.estimate

    field = Settling()
    ys = solve(field, start(), [0.0, 1.0], method="rk4", step_size=0.1, gradient="adjoint").ys
    weighed(ys).backward()
    assert all(parameter.grad is not None for parameter in field.parameters())


@pytest.mark.parametrize("how", KEPT.values(), ids=KEPT)
def test_hooks_of_parameters_run_on_the_whole_gradient(how: dict[str, Any]) -> None:
    net, calls = mlp(), []
    wanted = torch.autograd.grad(weighed(solve(net, start(), [0.0, 1.0], **how).ys), list(net.parameters()))
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: calls.append(1) or 2 * gradient)
    weighed(solve(net, start(), [0.0, 1.0], engine="stepper", **how).ys).backward()
    assert len(calls) == len(wanted)
    assert_equal([parameter.grad for parameter in net.parameters()], [2 * gradient for gradient in wanted])
