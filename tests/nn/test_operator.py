"""A block as one operator: torch.compile takes a model whole, and the numbers stay the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from neuralode.errors import UsageError
from neuralode.nn import MLPField, ODEBlock
from neuralode.nn.operator import solve
from neuralode.ode import SolverConfig

CONFIGS: list[dict[str, Any]] = [
    {"method": "dopri5"}, {"method": "rk4", "step_size": 0.1}, {"engine": "stepper"}, {"gradient": "adjoint"},
    {"engine": "torchdiffeq"},
]  # fmt: skip


def make(**options: Any) -> ODEBlock:
    torch.manual_seed(0)
    return ODEBlock(MLPField(4, [16, 16]).double(), SolverConfig(**options))


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("options", CONFIGS, ids=str)
@pytest.mark.parametrize("output", ["final", "trajectory"])
def test_a_model_is_compiled_whole(options: dict[str, Any], output: str) -> None:
    block = make(**options)
    block.output = output
    model = nn.Sequential(nn.Linear(3, 4).double(), block, nn.Linear(4, 2).double())
    x = torch.randn(8, 3).double().requires_grad_()
    found = []
    for network in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = network(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("around", [False, True])
def test_compiled_in_place(around: bool) -> None:
    block = make()
    plain, calls = copy.deepcopy(block), [0]
    block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    module = nn.Sequential(block) if around else block
    module.compile(backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 4).double()
    found = []
    for call in (plain, module):
        y = call(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(call.parameters()))])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert calls[0] == 1


def test_the_kernels_serve_inside() -> None:
    block = make()
    y0 = torch.randn(8, 4).double()
    engine = block.solve(y0).stats.engine
    block.stats = None
    torch.compile(block, fullgraph=True, backend="eager")(y0)
    assert block.stats is not None
    assert block.stats.engine == engine


@pytest.mark.parametrize("options", CONFIGS[:3], ids=str)
def test_pytorchs_own_check_of_operators(options: dict[str, Any]) -> None:
    block = make(**options)
    y0 = torch.randn(5, 4).double().requires_grad_()
    t = torch.tensor([0.0, 0.5, 1.0]).double()
    torch.library.opcheck(solve, (y0, t, [*block.parameters(), *block.buffers()], block._number))


def test_times_get_their_gradient() -> None:
    block = make(rtol=1e-8, atol=1e-9)
    y0 = torch.randn(5, 4).double()
    found = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        t = torch.tensor([0.0, 0.5, 1.0]).double().requires_grad_()
        found.append(torch.autograd.grad(call(y0, t).square().sum(), t)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_solves_with_its_own_parameters(duplicate: Any) -> None:
    block = make()
    block.compile(fullgraph=True, backend="eager")
    other = duplicate(block)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    y0 = torch.randn(5, 4).double()
    for one in (block, other):
        torch.testing.assert_close(torch.compile(one, fullgraph=True, backend="eager")(y0), one(y0))


def test_a_field_without_parameters() -> None:
    block = ODEBlock(torch.neg)
    y0 = torch.ones(3, 2)
    ours = torch.compile(block, fullgraph=True, backend="aot_eager")(y0)
    torch.testing.assert_close(ours, block(y0))


def test_a_tensor_that_is_set_later_is_refused() -> None:
    steered = make()
    compiled = torch.compile(steered, backend="aot_eager")
    compiled(torch.ones(3, 4).double())
    steered.field.context = torch.ones(4)  # nothing tells the compiler
    with pytest.raises(UsageError, match="no parameter and no buffer"):
        compiled(torch.ones(3, 4).double())
