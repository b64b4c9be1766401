"""Tables are made from the result files alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuralode.errors import UsageError
from neuralode.results import by_arm, columns_that_differ, labels, print_table, read_results, write_result


def result(arm: str | None, seed: int, accuracy: float, **config: float) -> dict:
    return {
        "name": "moons",
        "arm": arm,
        "seed": seed,
        "metrics": {"test/accuracy": accuracy},
        "parameters": 10,
        "solver": {"nfe_test": 14.0},
        "config": {
            "columns": ["test/accuracy", "test/mae", "nfe_test"],
            "seed": seed,
            "optimizer": config,
            "paths": {"output": f"runs/{seed}"},
            "callbacks": {"last": {"folder": f"runs/{seed}/checkpoints"}},
        },
    }


def test_seeds_of_an_arm_share_a_row() -> None:
    results = [result("a", 0, 0.5), result("a", 1, 1.0), result("b", 0, 0.25, lr=3.0)]
    assert by_arm(results, "test/accuracy") == {"a": [0.5, 1.0], "b": [0.25]}
    assert by_arm(results, "nfe_test") == {"a": [14.0, 14.0], "b": [14.0]}


def test_a_sweep_is_told_apart_by_what_it_varies() -> None:
    assert labels([result(None, 0, 1.0, lr=0.1, beta=0.9), result(None, 1, 1.0, lr=0.2, beta=0.9)]) == [
        "moons optimizer.lr=0.1",
        "moons optimizer.lr=0.2",
    ]


def test_columns_that_differ() -> None:
    results = [result("a", 0, 0.5), result("b", 0, 0.75)]
    assert columns_that_differ(results, ["test/accuracy", "test/mae", "nfe_test", "parameters"]) == ["test/accuracy"]


def test_table_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, accuracy in enumerate([0.5, 0.75, 1.0]):
        write_result(tmp_path / str(seed), result(None, seed, accuracy))
    print_table(read_results(tmp_path))
    printed = capsys.readouterr().out
    assert "0.75 ± 0.25" in printed
    assert "test/mae" not in printed, "a column that no run fills is left out"


def test_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no result\.json"):
        read_results(tmp_path)
