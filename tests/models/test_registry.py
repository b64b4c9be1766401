"""Models and fields by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from neuralode import register_field
from neuralode.errors import UsageError
from neuralode.models import FIELDS, MODELS, build_field, build_model, register_model
from neuralode.models.registry import import_field
from neuralode.nn import LotkaVolterraField, MLPField

OWN_FIELD = """
from torch import nn
class Gain(nn.Module):
    def __init__(self, features, gain=1.0):
        super().__init__()
        self.features, self.gain = features, gain
    def forward(self, t, y):
        return self.gain * y
"""


class Gain(nn.Module):
    """A field of somebody's own."""

    def __init__(self, features: int, gain: float = 1.0):
        super().__init__()
        self.rate = nn.Parameter(torch.full((features,), gain))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.rate * y


@pytest.fixture(autouse=True)
def _registries_as_before() -> Iterator[None]:
    kept = [(registry, dict(registry)) for registry in (FIELDS, MODELS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: build_model("ode_clasifier", {}), ["unknown model", "did you mean 'ode_classifier'", "resnet"]),
        (lambda: build_model("linear", {"feature": 2}), ["model 'linear'", "did you mean 'features'"]),
        (lambda: build_model("linear", {}), ["model 'linear'", "features"]),
        (lambda: build_field("mpl", 2, {}), ["unknown field 'mpl'", "did you mean 'mlp'", "conv"]),
        (lambda: build_field("mlp", 2, {"hiden": [3]}), ["field 'mlp'", "did you mean 'hidden'"]),
        (lambda: build_field("mlp", 2, {"hidden": 3}), ["field 'mlp'", "cannot be made", "3"]),
        (lambda: build_field("conv", 12, {}), ["12 channels", "groups=8"]),
        (lambda: build_field("someone.Field", 2, {}), ["someone.Field", "register_field('someone.Field', TheClass)"]),
    ],
    ids=["model", "argument", "missing argument", "field", "field argument", "value", "groups", "own field"],
)
def test_mistakes_are_one_sentence(build: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        build()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_fields_get_the_size_of_the_state_and_their_arguments() -> None:
    field = build_field("mlp", 3, {"hidden": [5], "time": True})
    assert isinstance(field, MLPField)
    assert [p.shape for p in field.parameters()] == [(5, 4), (5,), (3, 5), (3,)]
    prey = build_field("lotka_volterra", 2, {"initial": [1.0, 2.0, 3.0, 4.0]})
    assert isinstance(prey, LotkaVolterraField)
    torch.testing.assert_close(prey.log_coefficients.exp().tolist(), [1.0, 2.0, 3.0, 4.0])


def test_registered_field_works_in_a_model() -> None:
    register_field("gain", Gain)
    model = build_model("ode_classifier", {"features": 2, "classes": 3, "field": "gain", "field_args": {"gain": 0.5}})
    y0 = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(model.block(y0), y0 * torch.tensor(0.5).exp(), rtol=1e-3, atol=1e-4)


def test_field_that_wants_no_size() -> None:
    class Still(nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(y)

    register_field("still", Still)
    assert isinstance(build_field("still", 2, {}), Still)
    with pytest.raises(UsageError, match=r"field 'still'.*'gain'"):
        build_field("still", 2, {"gain": 1.0})


def test_registered_model() -> None:
    @register_model("gain_model")
    class GainModel(Gain):
        pass

    assert isinstance(build_model("gain_model", {"features": 2}), GainModel)


def test_dotted_field_is_imported_and_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_fields.py").write_text(OWN_FIELD)
    monkeypatch.syspath_prepend(tmp_path)
    import_field("somebodys_fields.Gain")
    del sys.modules["somebodys_fields"]
    assert build_field("somebodys_fields.Gain", 2, {"gain": 3.0}).gain == 3.0


def test_dotted_field_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_fields.py").write_text(OWN_FIELD)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"unknown name 'Gian'; did you mean 'Gain'\?"):
        import_field("more_fields.Gian")
    del sys.modules["more_fields"]
    with pytest.raises(UsageError, match="cannot import 'no_such_module'"):
        import_field("no_such_module.Gain")
