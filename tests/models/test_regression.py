"""Regression models: the network of two weights. (`linear` is in test_classifier.)"""

from __future__ import annotations

import torch

from neuralode.models import build_model


def test_two_weights() -> None:
    x = torch.tensor([[1.0], [-2.0]])
    model = build_model("two_weights", {})
    torch.testing.assert_close(model(x), 2.8 * 3.5 * x)
    model = build_model("two_weights", {"a": 2, "b": -3})
    assert {name: p.item() for name, p in model.named_parameters()} == {"a": 2.0, "b": -3.0}
    model(x).sum().backward()
    assert (model.a.grad.item(), model.b.grad.item()) == (3.0, -2.0)  # the inputs add up to −1
