"""Every experiment composes, instantiates, and runs one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from neuralode.cli import config_dir
from neuralode.data import images
from neuralode.overrides import normalised
from neuralode.training import train

EXPERIMENTS = sorted(f.stem for f in (config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture
def openml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few images where the fetcher would download thousands."""

    def fetch(name: str, **_: object) -> SimpleNamespace:
        pixels = np.random.default_rng(0).integers(0, 256, (140, 3072 if name.startswith("CIFAR") else 784))
        return SimpleNamespace(data=pixels, target=np.array([str(i % 10) for i in range(140)]))

    monkeypatch.setattr(images, "fetch_openml", fetch)


def arms(name: str) -> list[list[str]]:
    raw = yaml.safe_load((config_dir() / "experiment" / f"{name}.yaml").read_text())
    return list(raw.get("arms", {"only": []}).values())


@pytest.mark.usefixtures("openml")
@pytest.mark.parametrize(("name", "arm"), [(name, arm) for name in EXPERIMENTS for arm in arms(name)], ids=str)
def test_one_step(name: str, arm: list[str], make_config: Callable, tmp_path: Path) -> None:
    overrides = [f"+experiment={name}", *map(normalised, arm), "debug=fast"]
    cfg = make_config(*overrides, output=tmp_path)
    result = train(cfg, tmp_path, overrides)
    assert result["steps"] == 1
    assert np.isfinite(result["metrics"]["test/loss"])
    assert not list(tmp_path.rglob("*.ckpt")), "a dry run writes no checkpoint"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_says_in_one_line_what_it_shows(name: str) -> None:
    shows = yaml.safe_load((config_dir() / "experiment" / f"{name}.yaml").read_text())["shows"]
    assert 20 < len(shows) < 130
    assert "\n" not in shows


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_leaves_the_choice_of_the_solver(name: str, make_config: Callable) -> None:
    assert make_config(f"+experiment={name}", "solver=rk4").solver.method == "rk4"


def test_linear_regression_reaches_the_least_squares_solution(make_config: Callable, tmp_path: Path) -> None:
    overrides = ["+experiment=linear_regression"]
    result = train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    weights = result["weights"]
    assert weights["linear.bias"] == pytest.approx(4.21509616, abs=1e-6)
    assert weights["linear.weight"] == pytest.approx(2.77011339, abs=1e-6)


@pytest.mark.parametrize("gradient", ["exact", "adjoint"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_moons_learns_with_every_gradient(gradient: str, solver: str, make_config: Callable, tmp_path: Path) -> None:
    overrides = [f"solver={solver}", f"gradient={gradient}", "trainer.max_epochs=4", "scheduler=none"]
    result = train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    assert result["metrics"]["test/accuracy"] > 0.8
    assert result["solver"]["nfe_backward"] > 0


def test_descent_of_two_weights_loses_what_the_flow_conserves(make_config: Callable, tmp_path: Path) -> None:
    overrides = ["+experiment=flow_two_weights"]
    result = train(make_config(*overrides, output=tmp_path), tmp_path, overrides)
    a, b = 2.8, 3.5
    for _ in range(100):
        r = a * b - 0.6
        a, b = a - 0.05 * r * b, b - 0.05 * r * a
    assert result["weights"] == pytest.approx({"a": a, "b": b}, rel=1e-12)
    assert abs(a**2 - b**2) < 0.8 * 4.41
