"""The architecture: imports go down only (see the table of floors)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import neuralode

PACKAGE = Path(neuralode.__file__).parent

FLOORS = {
    "errors": 0,
    "kernels": 0,
    "ode": 1,
    "nn": 2,
    "gradient_flow": 2,
    "models": 3,
    "viz": 3,
    "data": 4,
    "tasks": 4,
    "callbacks": 4,
    "results": 5,
    "overrides": 5,
    "schema": 5,
    "training": 5,
    "experiment": 5,
    "cli": 5,
}

# A library, and the lowest floor that may import it; `matplotlib` and `torchdiffeq` belong to one room each.
LIBRARIES = {"lightning": 4, "hydra": 5, "omegaconf": 5}
ROOMS = {"matplotlib": "viz", "torchdiffeq": "ode"}


def rooms_and_imports() -> list[tuple[str, Path, str]]:
    found = []
    for file in PACKAGE.rglob("*.py"):
        relative = file.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative}: relative import"
                names = [str(node.module)]
            found += [(room, relative, name) for name in names]
    return found


def test_every_room_has_a_floor() -> None:
    assert {room for room, _, _ in rooms_and_imports()} <= set(FLOORS)


def test_imports_go_down_only() -> None:
    for room, file, name in rooms_and_imports():
        top, *rest = name.split(".")
        if top == "neuralode" and rest:
            assert FLOORS[rest[0]] <= FLOORS[room], f"{file} imports {name} from a floor above"
        if top in LIBRARIES:
            assert FLOORS[room] >= LIBRARIES[top], f"{file} imports {name}"
        if top in ROOMS:
            assert room == ROOMS[top], f"{file} imports {name}, which belongs to {ROOMS[top]}/"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_hold_one_idea(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
