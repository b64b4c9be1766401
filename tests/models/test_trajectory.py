"""The trajectory model: states at the observed times, in the data's units."""

from __future__ import annotations

import pytest
import torch

from neuralode.models.trajectory import TrajectoryModel
from neuralode.nn import MLPField, ODEBlock
from neuralode.ode import SolverConfig, solve

TIMES = torch.tensor([1.0, 1.5, 2.0, 4.0])
TIGHT = SolverConfig(rtol=1e-7, atol=1e-7)


def starts() -> torch.Tensor:
    return torch.tensor([[20.0, 0.5], [40.0, 1.0], [10.0, 2.0]])


def model(**kwargs: object) -> TrajectoryModel:
    torch.manual_seed(0)
    return TrajectoryModel(2, solver=TIGHT, field_args={"hidden": [8]}, **kwargs)


def test_states_at_every_time_from_the_first() -> None:
    predicted = model(scale=[20.0, 1.0])(starts(), TIMES)
    assert predicted.shape == (3, 4, 2)
    torch.testing.assert_close(predicted[:, 0], starts())


def test_follows_its_vector_field() -> None:
    fitted = model(scale=[20.0, 1.0])
    predicted = fitted(starts(), TIMES)
    along = solve(fitted.vector_field, starts(), TIMES, rtol=1e-7, atol=1e-7).ys.transpose(0, 1)
    torch.testing.assert_close(predicted, along, rtol=1e-4, atol=1e-4)


def test_scale_is_a_change_of_units() -> None:
    scale = torch.tensor([20.0, 0.1])
    torch.testing.assert_close(
        model(scale=scale.tolist())(starts() * scale, TIMES), model()(starts(), TIMES) * scale, rtol=1e-5, atol=1e-5
    )


def test_scale_is_saved_and_not_learned() -> None:
    fitted = model(scale=[20.0, 0.1])
    assert fitted.state_dict()["scale"].tolist() == pytest.approx([20.0, 0.1])
    assert "scale" not in dict(fitted.named_parameters())


def test_initial_state_can_be_learned() -> None:
    fitted = model(scale=[20.0, 1.0], learn_initial_state=True)
    assert torch.equal(fitted(starts(), TIMES), model(scale=[20.0, 1.0])(starts(), TIMES)), "it starts at one"
    with torch.no_grad():
        fitted.initial_factor.copy_(torch.tensor([2.0, 0.5]))
    predicted = fitted(starts(), TIMES)
    torch.testing.assert_close(predicted[:, 0], starts() * torch.tensor([2.0, 0.5]))
    predicted.sum().backward()
    assert fitted.initial_factor.grad.abs().min() > 0


def test_knows_whether_its_field_sees_the_time() -> None:
    class Pulse(torch.nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return y if t < 2 else -y

    def fitted(field: torch.nn.Module) -> TrajectoryModel:
        held = model()
        held.block = ODEBlock(field, TIGHT, output="trajectory")
        return held

    noisy = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    for field, seen in [(Pulse(), True), (MLPField(2, time=True), True), (MLPField(2), False), (noisy, False)]:
        state = torch.get_rng_state()
        assert fitted(field).depends_on_time(starts(), TIMES) == seen
        assert torch.equal(torch.get_rng_state(), state) or field is not noisy
    assert noisy[0].num_batches_tracked == 0
    assert not TrajectoryModel(2, field="lotka_volterra").depends_on_time(starts(), TIMES)


def test_prey_and_predator() -> None:
    fitted = TrajectoryModel(2, field="lotka_volterra", field_args={"initial": [1.0, 1.0, 1.0, 1.0]}, solver=TIGHT)
    balance = torch.ones(1, 2)
    torch.testing.assert_close(fitted(balance, TIMES), balance.expand(1, 4, 2))
