"""The vector fields that ship: shapes, what they depend on, and what they refuse."""

from __future__ import annotations

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.nn import AttentionField, ConvField, LotkaVolterraField, MLPField
from neuralode.nn.fields import ACTIVATIONS, activation
from neuralode.ode import solve

NOW, LATER = torch.tensor(0.0), torch.tensor(0.7)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    for field, y in [(MLPField(3, [4], name), torch.randn(5, 3)), (ConvField(8, 16, name), torch.randn(2, 8, 4, 4))]:
        dy = field(NOW, y)
        assert dy.shape == y.shape
        dy.sum().backward()
        assert all(p.grad is not None for p in field.parameters())


def test_unknown_activation() -> None:
    with pytest.raises(UsageError, match=r"'tahn'; did you mean 'tanh'\?"):
        activation("tahn")
    with pytest.raises(UsageError, match="relu"):
        MLPField(2, activation_name="gelu_")


def test_mlp_sees_time_only_if_told() -> None:
    y = torch.randn(5, 3)
    untimed, timed = MLPField(3, [4]), MLPField(3, [4], time=True)
    assert torch.equal(untimed(NOW, y), untimed(LATER, y))
    assert not torch.allclose(timed(NOW, y), timed(LATER, y))


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)], ids=str)
def test_mlp_acts_on_the_last_dimension(shape: tuple[int, ...]) -> None:
    field, y = MLPField(3, [4], time=True), torch.randn(shape)
    rows = torch.stack([field(LATER, row) for row in y.reshape(-1, 3)]).reshape(shape)
    torch.testing.assert_close(field(LATER, y), rows)


def test_mlp_widths_and_power() -> None:
    torch.manual_seed(0)
    plain = MLPField(2, [5, 7])
    assert [layer.out_features for layer in plain.net if hasattr(layer, "out_features")] == [5, 7, 2]
    torch.manual_seed(0)
    cubed, y = MLPField(2, [5, 7], power=3), torch.randn(4, 2)
    assert torch.equal(cubed(NOW, y), plain(NOW, y**3))


def test_mlp_without_hidden_layers_is_affine() -> None:
    field, y = MLPField(2, []), torch.randn(4, 2)
    torch.testing.assert_close(field(NOW, y), y @ field.net[0].weight.T + field.net[0].bias)


def test_mlp_initial_weights() -> None:
    torch.manual_seed(0)
    field = MLPField(50, [400], init_std=0.1)
    for layer in (field.net[0], field.net[2]):
        assert layer.weight.std().item() == pytest.approx(0.1, rel=0.05)
        assert not layer.bias.any()


def test_conv_sees_time() -> None:
    field, y = ConvField(8, hidden=16, groups=4), torch.randn(2, 8, 5, 6)
    assert field(NOW, y).shape == y.shape
    assert not torch.allclose(field(NOW, y), field(LATER, y))


def test_conv_groups_have_to_divide_the_channels() -> None:
    with pytest.raises(UsageError, match="12 and 12 channels; groups=8"):
        ConvField(12)
    with pytest.raises(UsageError, match="8 and 12 channels; groups=8"):
        ConvField(8, hidden=12)
    assert ConvField(12, groups=4)(NOW, torch.randn(1, 12, 2, 2)).shape == (1, 12, 2, 2)


def test_lotka_volterra_by_hand() -> None:
    field = LotkaVolterraField(initial=(1.0, 2.0, 3.0, 4.0))
    dy = field(NOW, torch.tensor([[5.0, 0.5], [0.0, 1.0]]))
    # 1·5 - 2·5·0.5 = 0 and 3·5·0.5 - 4·0.5 = 5.5; without prey the predators die at the rate 4
    torch.testing.assert_close(dy, torch.tensor([[0.0, 5.5], [0.0, -4.0]]))


def test_lotka_volterra_keeps_its_invariant() -> None:
    alpha, beta, delta, gamma = 0.9, 0.5, 0.4, 0.8
    field = LotkaVolterraField(initial=(alpha, beta, delta, gamma)).double()
    start = torch.tensor([[2.0, 1.0], [0.5, 3.0]], dtype=torch.float64)
    prey, predator = solve(field, start, torch.linspace(0, 10, 20).double(), rtol=1e-9, atol=1e-9).ys.unbind(-1)
    invariant = delta * prey - gamma * prey.log() + beta * predator - alpha * predator.log()
    assert prey.std() > 0.1
    torch.testing.assert_close(invariant, invariant[:1].expand_as(invariant), rtol=0, atol=1e-5)


def test_lotka_volterra_coefficients_stay_positive() -> None:
    field = LotkaVolterraField()
    optimizer = torch.optim.SGD(field.parameters(), lr=10.0)
    (field(NOW, torch.tensor([[1.0, 1.0]])) * torch.tensor([1.0, -1.0])).sum().backward()
    optimizer.step()
    assert (field.log_coefficients.exp() > 0).all()
    assert field.log_coefficients.exp().min() < 0.1


def test_lotka_volterra_refusals() -> None:
    with pytest.raises(UsageError, match=r"two species.*the data has 3"):
        LotkaVolterraField(3)
    for initial in [(0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.0)]:
        with pytest.raises(UsageError, match="four positive numbers"):
            LotkaVolterraField(initial=initial)


def test_attention_is_pytorchs() -> None:
    """Against PyTorch's own attention, and no position sees a later one."""
    field, x = AttentionField(8, heads=2, time=False), torch.randn(3, 5, 8)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in field.queries_keys_values(x).chunk(3, dim=-1))
    taken = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(field.attention(x), field.mixed(taken.transpose(1, 2).flatten(2)))


def test_attention_sees_time_only_if_told_and_has_second_derivatives() -> None:
    y = torch.randn(2, 5, 8)
    untimed, timed = AttentionField(8, time=False), AttentionField(8)
    assert torch.equal(untimed(NOW, y), untimed(LATER, y))
    assert not torch.allclose(timed(NOW, y), timed(LATER, y))
    small = AttentionField(4, heads=2, hidden=3).double()
    start = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y: small(LATER.double(), y), start)


def test_attention_refuses_sizes_that_do_not_fit() -> None:
    for heads in (3, 0, -1):
        with pytest.raises(UsageError, match=f"heads={heads} has to divide"):
            AttentionField(8, heads=heads)
    with pytest.raises(UsageError, match="hidden=-1"):
        AttentionField(8, hidden=-1)
