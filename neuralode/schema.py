"""Types for every configuration key that is ours, read off the classes that the keys fill.

A config is composed by Hydra without types, then merged into these; so a wrong type or an unknown key is refused
wherever it came from, `+solver.foo=3` included, and no key is declared twice.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from torch import nn

from neuralode.data import DATA, ArrayData
from neuralode.errors import UsageError, unknown
from neuralode.models import MODELS
from neuralode.ode import SolverConfig
from neuralode.tasks import TASKS, Task

# Arguments that the run provides, from the data or from other groups; no config sets them.
PROVIDED: dict[type, set[str]] = {
    nn.Module: {"features", "classes", "image", "targets", "scale", "vocabulary", "length", "solver"},
    Task: {"model", "optimizer", "scheduler", "scheduler_monitor", "interval", "description", "train_until"},
    ArrayData: set(),
}


@dataclass
class RunConfig:
    """The top level of a config. Groups of other people's classes (optimizer, trainer, ...) stay untyped."""

    name: str
    shows: str
    seed: int
    seeds: list[int]
    arms: dict[str, list[str]]
    arm: str | None
    fit: bool
    test: bool
    evaluate: str
    ckpt_path: str | None
    threads: int | None
    columns: list[str]
    model: dict[str, Any]
    data: dict[str, Any]
    task: dict[str, Any]
    solver: dict[str, Any]
    optimizer: Any
    scheduler: Any
    trainer: dict[str, Any]
    callbacks: dict[str, Any]
    logger: dict[str, Any]
    monitor: dict[str, Any]
    paths: dict[str, Any]


@dataclass
class MonitorConfig:
    """What is watched during training."""

    metric: str = "val/accuracy"
    """Decides which checkpoint is the best."""
    mode: str = "max"
    """`max` if a larger metric is better, else `min`."""
    solver_every: int = 10
    """Training steps between two points of the `solver/` charts."""
    figure_every: int = 10
    """Epochs between two phase portraits."""
    patience: int = 20
    """Validations without progress of the metric after which `callbacks=early_stopping` stops the run."""
    flow_mode: str = "window"
    """What `callbacks=gradient_flow` compares SGD with: `window`, `piecewise` or `global`."""
    flow_window: int = 50
    """Steps of a window; in the mode `global` steps between two points of the path."""
    flow_probe: int | None = None
    """Most training samples on which it measures; null for 1024, in the mode `global` for all."""
    flow_defect_every: int = 25
    """Steps between two measurements of the defect."""
    flow_every: int = 500
    """Steps between two measurements of sharpness, derivatives and windows."""
    flow_budget: float | None = 0.1
    """Share of the training's time that it may take; null for no limit."""
    flow_rtol: float = 1e-3
    """Tolerance of the flow."""
    flow_plane: str = "ends"
    """Plane of the trajectory figure: `ends` or `pca`."""
    flow_loss_floor: float = 0.0
    """L*, the least loss there can be, for the rate of convergence."""


@dataclass
class PathsConfig:
    runs: str = "runs"
    """Folder of all runs."""
    output: str | None = None
    """Folder of this run; the program fills it in."""


REGISTRIES: dict[str, tuple[collections.abc.Mapping[str, type], str]] = {
    "model": (MODELS, "model"),
    "data": (DATA, "data"),
    "task": (TASKS, "task"),
}


def validate(cfg: DictConfig) -> DictConfig:
    """The config, each of our values of its declared type.

    Raises:
        UsageError: names the key that is wrong, what is allowed there, and the nearest name that exists.
    """
    cfg = _merge(RunConfig, cfg, "")
    for group, (registry, kind) in REGISTRIES.items():
        name = cfg[group].get("name")
        if name not in registry:
            raise UsageError(f"{group}.name: " + unknown(kind, name, registry))
        cfg[group] = _merge(_signature_schema(registry[name]), cfg[group], group)
    for group, schema in (("solver", SolverConfig), ("monitor", MonitorConfig), ("paths", PathsConfig)):
        cfg[group] = _merge(schema, cfg[group], group)
    solver_config(cfg)  # its own checks: tolerances, method
    if cfg.evaluate not in ("best", "last"):
        raise UsageError(f"evaluate is {cfg.evaluate!r}; it has to be 'best' or 'last' (which weights are tested).")
    if cfg.arm is not None and cfg.arm not in cfg.arms:
        raise UsageError(unknown("arm", cfg.arm, cfg.arms))
    return cfg


def solver_config(cfg: DictConfig) -> SolverConfig:
    """The `solver` group as the object that blocks take."""
    return SolverConfig(**typing.cast(dict[str, Any], OmegaConf.to_container(cfg.solver, resolve=True)))


def _merge(schema: type, node: Any, path: str) -> DictConfig:
    """`node` merged into the types of the dataclass `schema`."""
    # made before the merge, so that nothing is checked but types
    typed = OmegaConf.structured(schema)
    prefix = f"{path}." if path else ""
    try:
        merged = OmegaConf.merge(typed, OmegaConf.create(OmegaConf.to_container(node, resolve=True)))
        OmegaConf.to_container(merged, throw_on_missing=True)
    except ConfigKeyError as error:
        key = str(getattr(error, "key", None) or error.full_key)
        raise UsageError(unknown("key", prefix + key, [prefix + str(k) for k in typed])) from error
    except ValidationError as error:
        sentence = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"{prefix}{error.full_key}: {sentence[0].lower()}{sentence[1:]}.") from error
    except OmegaConfBaseException as error:
        raise UsageError(f"{path or 'config'}: {str(error).splitlines()[0]}") from error
    # Other people's groups and the rest of the program expect plain containers without types.
    return typing.cast(DictConfig, OmegaConf.create(OmegaConf.to_container(merged, resolve=True)))


def config_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments of a registered class that a config may set."""
    # a Task is an nn.Module too: the closest base counts
    provided = next(PROVIDED[base] for base in cls.__mro__ if base in PROVIDED)
    return {
        name: p
        for name, p in inspect.signature(cls).parameters.items()
        if name not in provided and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def _signature_schema(cls: type) -> type:
    """A dataclass with the config arguments of a class, and the `name` it is registered under."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    fields: list[Any] = [("name", str)]
    for name, parameter in config_arguments(cls).items():
        default = None if parameter.default is parameter.empty else parameter.default
        kind = _plain_type(hints.get(name, Any))
        if isinstance(default, list | dict | tuple):
            copy = list if isinstance(default, list | tuple) else dict
            fields.append((name, kind, dataclasses.field(default_factory=functools.partial(copy, default))))
        else:
            fields.append((name, kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(cls.__name__ + "Config", fields)


def _plain_type(hint: Any) -> Any:
    """The type in the words that OmegaConf knows: sequences and tuples become lists."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (collections.abc.Sequence, tuple):
        return list[args[0]]  # type: ignore[valid-type]
    if origin in (typing.Union, types.UnionType):
        inner = [_plain_type(a) for a in args if a is not type(None)]
        return inner[0] | None if len(inner) == 1 else Any
    return hint
