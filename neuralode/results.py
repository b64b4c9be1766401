"""`result.json` of every run, and the tables and figures that are made from those files alone.

`python -m neuralode.results runs/digits` prints the table of all runs below a folder.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from neuralode.errors import UsageError

RESULT = "result.json"
TEST_RESULT = "test.json"  # of a checkpoint that was only tested
# keys in which the runs of one row differ anyway
NOT_VARIED = ("seed", "shows", "columns", "paths.", "ckpt_path", "arm", "fit", "test")
PACKAGES = ("neuralode", "torch", "torchdiffeq", "lightning", "hydra-core")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_result(folder: Path, result: Mapping[str, Any], name: str = RESULT) -> None:
    """Writes a result; a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.draft"
    draft.write_text(json.dumps(result, indent=2, default=str) + "\n")
    os.replace(draft, folder / name)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results below a folder, in order of their paths. Raises UsageError where there is none."""
    files = sorted(folder.rglob(RESULT))
    if not files:
        raise UsageError(f"there is no {RESULT} below {str(folder)!r}; give the folder of a finished run.")
    return [read_result(file) for file in files]


def read_result(file: Path) -> dict[str, Any]:
    """The content of one result file."""
    return json.loads(file.read_text())


def value(result: Mapping[str, Any], column: str) -> float | None:
    """A column of a result: a metric such as `test/accuracy`, or `parameters`, `seconds`, ..."""
    for place in (*(result.get(part, {}) for part in ("metrics", "solver", "gradient_flow", "weights")), result):
        if isinstance(place.get(column), int | float):
            return float(place[column])
    return None


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The row of the table that each result belongs to: its arm, and the config values in which a sweep differs."""
    names = [r["arm"] or r["name"] for r in results]
    configs = [comparable(r["config"]) for r in results]
    rows = []
    for name, config in zip(names, configs, strict=True):
        alike = [c for n, c in zip(names, configs, strict=True) if n == name]
        varied = [f"{k}={config[k]}" for k in config if any(c.get(k) != config[k] for c in alike)]
        rows.append(" ".join([name, *varied]))
    return rows


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that say what was run, and not where."""
    folder = str(config.get("paths", {}).get("output"))
    return {k: v for k, v in flat(config).items() if not k.startswith(NOT_VARIED) and folder not in str(v)}


def by_arm(results: Sequence[Mapping[str, Any]], column: str) -> dict[str, list[float]]:
    """The column's values, one a seed, for each row of the table."""
    arms: dict[str, list[float]] = {}
    for row, result in zip(labels(results), results, strict=True):
        found = value(result, column)
        arms.setdefault(row, []).extend([] if found is None else [found])
    return arms


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, item in node.items():
        nested = isinstance(item, Mapping) and item
        found |= flat(item, f"{prefix}{key}.") if nested else {f"{prefix}{key}": item}
    return found


def columns_with_values(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Those of the columns that at least one result fills."""
    return [column for column in columns if any(value(r, column) is not None for r in results)]


def columns_that_differ(results: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Those of the columns that do not have one value in all results that fill them."""
    return [column for column in columns if len({value(r, column) for r in results} - {None}) > 1]


def print_table(results: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Prints an arm a line: the mean over its seeds, and the standard deviation where there are several."""
    from rich.console import Console
    from rich.table import Table

    columns = columns_with_values(results, columns or results[0]["config"]["columns"])
    table = Table(title=results[0]["name"], title_justify="left", header_style="bold")
    table.add_column("arm" if results[0]["arm"] else "run")
    table.add_column("seeds", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    found = {column: by_arm(results, column) for column in columns}
    for arm, runs in Counter(labels(results)).items():
        table.add_row(arm, str(runs), *(_cell(found[column].get(arm, [])) for column in columns))
    # in a log file there is no window to fit into: keep every row on one line
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if len(values) == 1 or max(values) == min(values):
        return f"{mean:.6g}"
    return f"{mean:.4g} ± {statistics.stdev(values):.2g}"


def main() -> None:
    """Prints a table for each experiment below the folder given on the command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m neuralode.results FOLDER")
    try:
        results = read_results(Path(sys.argv[1]))
    except UsageError as error:
        sys.exit(str(error))
    for name in dict.fromkeys(r["name"] for r in results):
        print_table([r for r in results if r["name"] == name])


if __name__ == "__main__":
    main()
