"""Every shipped YAML fits the classes that it fills, and nothing else gets through."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import yaml

from neuralode.cli import config_dir
from neuralode.errors import UsageError
from neuralode.schema import REGISTRIES, config_arguments

FILES = [(g, f) for g in REGISTRIES for f in sorted((config_dir() / g).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "file"), FILES, ids=lambda x: getattr(x, "stem", x))
def test_every_argument_of_a_class_can_be_overridden(group: str, file: object, make_config: Callable) -> None:
    # Hydra refuses to override a key that no YAML lists
    name = file.stem  # type: ignore[attr-defined]
    cfg = make_config(f"{group}={name}")
    raw = yaml.safe_load(file.read_text())  # type: ignore[attr-defined]
    listed = set(raw)
    for parent in raw.get("defaults", []):
        if parent != "_self_":
            listed |= set(yaml.safe_load((config_dir() / group / f"{parent}.yaml").read_text()))
    assert set(config_arguments(REGISTRIES[group][0][cfg[group].name])) <= listed - {"name", "defaults"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+solver.foo=3", ["solver.foo", "Allowed", "solver.atol"]),
        ("+solver.rtoll=3", ["solver.rtoll", "did you mean 'solver.rtol'"]),
        ("solver.rtol=high", ["solver.rtol", "high"]),
        ("solver.rtol=-1", ["solver.rtol", "positive"]),
        ("solver.method=dopr5", ["dopr5", "did you mean 'dopri5'"]),
        ("solver.method=rk4", ["rk4", "solver.step_size"]),
        ("solver.gradient=ajoint", ["did you mean 'adjoint'"]),
        ("data.samples=many", ["data.samples", "many"]),
        ("+data.sample=3", ["did you mean 'data.samples'"]),
        ("model.name=ode_clasifier", ["did you mean 'ode_classifier'"]),
        ("monitor.patience=0.5", ["monitor.patience"]),
        ("seed=one", ["seed", "one"]),
        ("+nonsense=1", ["nonsense", "Allowed"]),
        ("evaluate=worst", ["evaluate", "best"]),
        ("arm=plain", ["unknown arm 'plain'"]),
    ],
)
def test_wrong_values_are_refused_with_the_key(override: str, words: list[str], make_config: Callable) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(override)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flag_of_the_trainer_is_listed(make_config: Callable) -> None:
    flags = set(inspect.signature(pl.Trainer).parameters) - {"logger", "callbacks", "default_root_dir"}
    assert flags == set(make_config().trainer) - {"_target_"}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "moons"),
        (["data=digits"], "digits"),
        (["data=mnist"], "mnist"),
        (["data=csv", "data.path='far/my pelts (1).csv'"], "my_pelts_1_"),
        (["+experiment=flow_moons"], "flow_moons"),
        (["+experiment=lynx_hare", "name=mine"], "mine"),
    ],
)
def test_run_is_named_for_its_experiment_or_its_data(overrides: list[str], name: str, make_config: Callable) -> None:
    assert make_config(*overrides).name == name


def test_values_keep_their_types(make_config: Callable) -> None:
    cfg = make_config("solver.rtol=1", "data.noise=0")
    assert isinstance(cfg.solver.rtol, float)
    assert isinstance(cfg.data.noise, float)
    assert cfg.solver.step_size is None
