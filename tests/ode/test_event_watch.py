"""What a solve with events does besides: samples that met theirs are left alone, and steps are not kept in vain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neuralode.ode import solve
from neuralode.ode.events import EventWatch


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("per_sample", [True, False])
def test_a_sample_that_met_its_event_is_left_there(per_sample: bool, kernels: bool, monkeypatch: Any) -> None:
    """The field is hardly asked beyond it, where it may have nothing to say."""
    if not kernels:
        monkeypatch.setattr("neuralode.kernels.stages.library", lambda: None)
    beyond = []

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        beyond.append(bool(y[0, 0] > 1.1))
        return torch.tensor([[1.0], [-0.1]], dtype=y.dtype) * (1 + torch.sin(20 * t)).expand(2, 1)

    y0 = torch.zeros(2, 1, dtype=torch.float64)
    found = solve(field, y0, [0.0, 10.0], events=lambda t, y: y[:, 0] - 1, per_sample=per_sample, rtol=1e-8, atol=1e-8)
    assert found.events is not None
    assert found.events.happened.tolist() == [True, False]
    assert len(beyond) > 1000
    assert sum(beyond) < 10


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_dense_output_of_the_steps_is_kept_where_it_is_asked_for(
    dense: bool, per_sample: bool, monkeypatch: Any
) -> None:
    kept = []
    fill = EventWatch.fill
    monkeypatch.setattr(EventWatch, "fill", lambda self, ts: (kept.append(self.loop.extras.dense), fill(self, ts))[1])
    y0 = torch.ones(2, 1, dtype=torch.float64)
    solution = solve(
        lambda t, y: -y, y0, [0.0, 3.0], events=lambda t, y: y[:, 0] - 0.3, dense=dense, per_sample=per_sample
    )
    assert len(kept[0]) == (max(solution.stats.accepted, 1) if dense else 0)
