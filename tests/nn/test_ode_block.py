"""ODEBlock as a layer: any field, any shape, and the habits of an nn.Module."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from neuralode import ODEBlock, Solution, SolveError, SolverConfig, UsageError, solve
from neuralode.nn import ConvField, MLPField

Y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 3.0]])
FIXED = {"method": "rk4", "step_size": 0.25}


class Decay(nn.Module):
    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -y


class DecayOfState(nn.Module):
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return -y


def decay(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -y


def mlp() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, [8], time=True)


@pytest.mark.parametrize(
    "field",
    [
        Decay(),
        DecayOfState(),
        decay,
        lambda y: -y,
        lambda t, y: -y,
        lambda *args: -args[1],
        lambda t, *rest: -rest[0],
        nn.Sequential(DecayOfState()),
        torch.neg,
    ],
    ids=[
        "f(t,y)",
        "f(y)",
        "function",
        "lambda y",
        "lambda t,y",
        "lambda *args",
        "lambda t,*rest",
        "sequential",
        "builtin",
    ],
)
def test_fields_of_every_kind(field: Any) -> None:
    final = ODEBlock(field, SolverConfig(rtol=1e-6, atol=1e-6))(Y0)
    torch.testing.assert_close(final, Y0 * torch.tensor(-1.0).exp(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "field", [lambda s, k=2.0: -k * s, lambda x, t=0.0: -2 * x, lambda t, y=None: -2 * y, lambda _, y=None: -2 * y]
)
def test_an_argument_with_a_default_is_no_state_unless_the_first_is_the_time(field: Any) -> None:
    final = ODEBlock(field, SolverConfig(rtol=1e-6, atol=1e-6))(Y0)
    torch.testing.assert_close(final, Y0 * torch.tensor(-2.0).exp(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (2, 3, 2), (1, 8, 4, 4)], ids=str)
def test_states_of_every_shape(shape: tuple[int, ...]) -> None:
    field = ConvField(8) if len(shape) == 4 else MLPField(2, [4])
    assert ODEBlock(field)(torch.randn(shape)).shape == shape


def test_tuple_state() -> None:
    block = ODEBlock(lambda t, y: (y[1], -y[0]), SolverConfig(rtol=1e-6, t_span=[0.0, torch.pi / 2]))
    position, velocity = block((torch.ones(3), torch.zeros(3)))
    torch.testing.assert_close(position, torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(velocity, -torch.ones(3), rtol=0, atol=1e-4)


def test_final_trajectory_and_times() -> None:
    config = SolverConfig(t_span=[0.0, 2.0])
    final, trajectory = ODEBlock(decay, config), ODEBlock(decay, config, output="trajectory")
    assert final(Y0).shape == (3, 2)
    assert trajectory(Y0).shape == (2, 3, 2)
    assert torch.equal(trajectory(Y0)[-1], final(Y0))
    times = [0.0, 0.5, 1.0, 2.0]
    assert torch.equal(final(Y0, times), trajectory(Y0, times))
    assert torch.equal(final(Y0, times), solve(decay, Y0, times).ys)
    with pytest.raises(UsageError, match=r"'last'.*'final' or 'trajectory'"):
        ODEBlock(decay, output="last")


def test_solve_returns_the_solution() -> None:
    block = ODEBlock(decay)
    solution = block.solve(Y0)
    assert isinstance(solution, Solution)
    assert torch.equal(solution.final, block(Y0))


def test_a_field_in_the_place_of_another_takes_its_own_arguments() -> None:
    block = ODEBlock(Decay())
    wanted = block(Y0)
    for field in (DecayOfState(), Decay()):
        block.field = field
        assert torch.equal(block(Y0), wanted)
        assert torch.equal(block.vector_field(torch.tensor(0.0), Y0), -Y0)
        assert torch.equal(copy.deepcopy(block)(Y0), wanted)


def test_span_may_run_backwards() -> None:
    forth, back = ODEBlock(mlp(), SolverConfig(rtol=1e-7, atol=1e-7)), ODEBlock(mlp())
    back.solver = SolverConfig(rtol=1e-7, atol=1e-7, t_span=[1.0, 0.0])
    torch.testing.assert_close(back(forth(Y0)), Y0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
def test_trains_inside_a_sequential(gradient: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), ODEBlock(MLPField(4, [8]), SolverConfig(gradient=gradient)), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    x = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x.prod(1)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_statistics_are_of_the_last_call() -> None:
    block = ODEBlock(mlp(), SolverConfig(**FIXED))
    assert block.stats is None
    block(Y0)
    first = block.stats
    block(Y0).sum().backward()
    assert block.stats is not first
    assert (block.stats.nfe, block.stats.nfe_backward) == (16, 16)
    assert (first.nfe, first.nfe_backward) == (16, 0)


def test_deepcopy_is_independent() -> None:
    block = ODEBlock(mlp())
    block(Y0).sum().backward()
    twin = copy.deepcopy(block)
    assert torch.equal(twin(Y0), block(Y0))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(twin(Y0), block(Y0))


def test_state_dict_round_trip() -> None:
    block, other = ODEBlock(mlp()), ODEBlock(MLPField(2, [8], time=True))
    assert set(block.state_dict()) == {f"field.{name}" for name, _ in block.field.named_parameters()}
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(Y0), block(Y0))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(Y0), block(Y0))


def test_float64() -> None:
    block = ODEBlock(mlp(), SolverConfig(rtol=1e-10, atol=1e-10)).to(torch.float64)
    final = block(Y0.double())
    assert final.dtype == torch.float64
    torch.testing.assert_close(final.float(), ODEBlock(mlp(), SolverConfig(rtol=1e-6, atol=1e-6))(Y0))


def test_train_and_eval_reach_the_field() -> None:
    field = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    block = ODEBlock(field, SolverConfig(**FIXED))
    assert not torch.equal(block(Y0), block(Y0))
    block.eval()
    assert torch.equal(block(Y0), block(Y0))


def test_augmented_zeros() -> None:
    block = ODEBlock(lambda t, y: torch.zeros_like(y), augment=3)
    for y0, zeros in [(Y0, torch.zeros(3, 3)), (torch.randn(2, 5, 4, 4), torch.zeros(2, 3, 4, 4))]:
        wanted = torch.cat([y0, zeros], dim=1)
        assert torch.equal(block.augmented(y0), wanted)
        torch.testing.assert_close(block(y0), wanted)
    assert torch.equal(ODEBlock(decay).augmented(Y0), Y0)
    with pytest.raises(UsageError, match="tuple state cannot be augmented"):
        block((Y0, Y0))


def test_field_acts_on_the_augmented_state() -> None:
    block = ODEBlock(MLPField(4, [8]), augment=2)
    final = block(Y0)
    assert final.shape == (3, 4)
    assert final[:, 2:].abs().max() > 0


def test_autocast_solves_in_float32() -> None:
    block, seen = ODEBlock(mlp()), []
    block.field.net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = nn.functional.linear(Y0, torch.eye(2))
        assert narrow.dtype == torch.bfloat16
        final = block(narrow)
    assert final.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert torch.equal(final, block(narrow.float()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"half precision.*autocast"):
        ODEBlock(mlp()).to(dtype)(Y0.to(dtype))


@pytest.mark.parametrize(
    ("y0", "name"),
    [([Y0, Y0], "list"), (Y0.numpy(), "ndarray"), ((Y0, [Y0]), "tuple"), ((), "tuple"), (None, "NoneType")],
    ids=["list", "array", "list in a tuple", "empty", "nothing"],
)
def test_states_that_are_no_tensors_are_refused(y0: Any, name: str) -> None:
    with pytest.raises(UsageError, match=f"y0 is a {name}; give the initial state as a tensor or a tuple of tensors"):
        ODEBlock(decay)(y0)


@pytest.mark.parametrize("field", [lambda x, *args: -x, lambda x, *args, **options: -x, lambda x, k=1.0, *args: -k * x])
def test_a_field_that_leaves_open_whether_it_takes_the_time_is_refused(field: Any) -> None:
    with pytest.raises(UsageError, match=r"the field takes \(x.*\*args.*as f\(y\) or f\(t, y\)"):
        ODEBlock(field)


def test_failed_solve_raises() -> None:
    with pytest.raises(SolveError):
        ODEBlock(mlp(), SolverConfig(max_steps=1, rtol=1e-9))(Y0)
