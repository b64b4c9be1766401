"""Which builds of the kernels are used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from neuralode import kernels, solve
from neuralode.kernels import library as builds
from neuralode.ode import fused_engine

BUILT = [name for name in builds.INSTRUCTION_SETS if builds.path_of(name).exists()]
pytestmark = pytest.mark.skipif(not BUILT, reason="no kernels are built")


@pytest.fixture
def other_sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The builds as they are after the sources have changed."""
    monkeypatch.setattr(builds, "version", lambda: 1)
    monkeypatch.setattr(fused_engine, "_kinds", {})
    builds.library.cache_clear()
    yield
    builds.library.cache_clear()


@pytest.mark.parametrize("name", BUILT)
def test_the_builds_are_of_these_sources(name: str) -> None:
    assert builds.load(builds.path_of(name)) is not None


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("doubles", [0, 1])
def test_a_build_has_its_own_instructions_and_no_others(name: str, doubles: int) -> None:
    """A processor that lacks those of another build would stop the process at the first of them."""
    loaded = builds.load(builds.path_of(name))
    assert loaded is not None
    assert loaded.neuralode_vector_bytes(doubles) == {"avx512": 64, "avx2": 32, "plain": 16}[name]


@pytest.mark.usefixtures("other_sources")
def test_a_build_of_other_sources_is_left_alone() -> None:
    """What it takes for a problem lies elsewhere in memory: it would crash, or give wrong numbers."""
    assert all(builds.load(builds.path_of(name)) is None for name in BUILT)
    assert "made from other sources" in kernels.report()
    solution = solve(lambda t, y: -y, torch.ones(2, 1), [0.0, 1.0])
    assert solution.stats.engine == "stepper"
    assert "install the package again" in solution.stats.reason


@pytest.mark.parametrize("bytes_left", [0, 100, 300_000, -1])
def test_a_part_of_a_build_is_left_alone(bytes_left: int, tmp_path: Path) -> None:
    """The loader would stop the process."""
    part = tmp_path / "part.so"
    part.write_bytes(builds.path_of(BUILT[0]).read_bytes()[:bytes_left])
    assert builds.load(part) is None


def test_the_report_says_what_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = tmp_path / "part.so"
    part.write_bytes(builds.path_of(BUILT[0]).read_bytes()[:300_000])
    monkeypatch.setattr(sys.modules["neuralode.kernels.report"], "path_of", lambda name: part)
    assert "plain: built, but it does not load" in kernels.report()
    assert "install the package again" in kernels.report()


def test_the_report_says_that_a_variable_holds_pytorch_back() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    ended = subprocess.run(
        [sys.executable, "-m", "neuralode.kernels"], env=environment, capture_output=True, text=True, check=True
    )
    assert "does not have the instructions" not in ended.stdout
    held = [line for line in ended.stdout.splitlines() if "ATEN_CPU_CAPABILITY=default holds PyTorch" in line]
    assert len(held) == len(set(BUILT) - {"plain"})
