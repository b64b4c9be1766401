"""Models: plain torch modules, by name."""

from neuralode.models import classifier, language, regression, trajectory
from neuralode.models.registry import FIELDS, MODELS, build_field, build_model, register_field, register_model
from neuralode.models.saved import load

__all__ = [
    "FIELDS",
    "MODELS",
    "build_field",
    "build_model",
    "classifier",
    "language",
    "load",
    "register_field",
    "register_model",
    "regression",
    "trajectory",
]
