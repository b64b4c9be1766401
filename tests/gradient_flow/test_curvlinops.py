"""curvlinops as an oracle, where it is installed; with its dependencies it would bring another build of torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neuralode.gradient_flow import GradientField, Sharpness

curvlinops = pytest.importorskip("curvlinops")


@pytest.mark.filterwarnings("ignore")
def test_sharpness_is_the_largest_eigenvalue_of_curvlinops_hessian() -> None:
    from scipy.sparse.linalg import eigsh

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    batch = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    operator = curvlinops.HessianLinearOperator(network, nn.MSELoss(), list(network.parameters()), [batch])
    known = float(eigsh(operator.to_scipy(), k=1, which="LA", return_eigenvectors=False)[0])
    field = GradientField(network, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batch)
    theta, sharpness = field.theta, Sharpness()
    cold, warm = (sharpness(lambda v: field.product(theta, v), theta).value for _ in range(2))
    assert cold == pytest.approx(known, rel=0.012)
    assert warm == pytest.approx(known, rel=0.005)
