"""Fixtures: a run of `train.py` as a person starts it, and one inside this process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from neuralode.cli import config_dir
from neuralode.schema import validate

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    output: str
    """Standard output and error together."""


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def train_cli(tmp_path: Path) -> Callable[..., Finished]:
    """Runs `python train.py` with these overrides in an empty folder."""

    def run(*overrides: str, cwd: Path = tmp_path) -> Finished:
        done = subprocess.run(
            command(*overrides), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
        )
        return Finished(done.returncode, done.stdout + done.stderr)

    return run


@pytest.fixture
def make_config() -> Callable[..., DictConfig]:
    """The validated config of a command line."""

    def make(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", overrides=list(overrides))
        cfg._set_flag("struct", False)
        return cfg

    def validated(*overrides: str, output: Path | None = None) -> DictConfig:
        cfg = make(*overrides)
        if output is not None:
            cfg.paths.output = str(output)
        return validate(cfg)

    return validated


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
