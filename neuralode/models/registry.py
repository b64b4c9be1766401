"""Models and fields by name: a checkpoint holds these names, never import paths."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from neuralode.errors import UsageError, unknown
from neuralode.nn import AttentionField, ConvField, LotkaVolterraField, MLPField

MODELS: dict[str, type[nn.Module]] = {}
FIELDS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPField,
    "conv": ConvField,
    "attention": AttentionField,
    "lotka_volterra": LotkaVolterraField,
}

T = TypeVar("T", bound=type[nn.Module])


def register_model(name: str) -> Callable[[T], T]:
    """Class decorator: makes a model known to configs and checkpoints by `name`."""

    def add(cls: T) -> T:
        MODELS[name] = cls
        return cls

    return add


def register_field(name: str, field: Callable[..., nn.Module]) -> None:
    """Makes a field known to configs and checkpoints by `name`.

    Args:
        name: the name to use as `model.field`; a checkpoint trained with `model.field=my_module.MyField` is loaded
            after registering that very name.
        field: called with the size of the state, then with `model.field_args`.
    """
    FIELDS[name] = field


def build_model(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The registered model `name`, made with `args`. Raises UsageError for an unknown name or argument."""
    if name not in MODELS:
        raise UsageError(unknown("model", name, MODELS))
    return _call(MODELS[name], f"model {name!r}", dict(args))


def build_field(name: str, features: int, args: Mapping[str, Any]) -> nn.Module:
    """A vector field for states of size `features`.

    Args:
        name: a registered name. (`import_field` makes one of a dotted path.)
        features: size of dimension 1 of the state: features or channels.
        args: further arguments of the field.
    """
    if name not in FIELDS:
        advice = ""
        if "." in name:
            advice = (
                f"It is somebody's own field: import it and call neuralode.register_field({name!r}, TheClass) first."
            )
        raise UsageError(unknown("field", name, FIELDS, advice))
    field = FIELDS[name]
    takes_features = "features" in inspect.signature(field).parameters
    return _call(field, f"field {name!r}", dict(args), *([features] if takes_features else []))


def import_field(path: str) -> None:
    """Imports `package.module.Class` and registers it under that path.

    Only an entry point that was told the path by its user calls this; loading a checkpoint never does.
    """
    module_name, _, class_name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"model.field={path}: cannot import {module_name!r} ({error}); it has to be a module on the Python path, "
            "the current folder included."
        ) from error
    if not hasattr(module, class_name):
        raise UsageError(f"model.field={path}: " + unknown("name", class_name, [n for n in dir(module) if n[0] != "_"]))
    register_field(path, getattr(module, class_name))


def _call(build: Callable[..., nn.Module], what: str, args: dict[str, Any], *positional: Any) -> nn.Module:
    parameters = inspect.signature(build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in args:
            if key not in parameters:
                raise UsageError(f"{what}: " + unknown("argument", key, parameters))
    try:
        return build(*positional, **args)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} cannot be made from {args}: {error}") from error
