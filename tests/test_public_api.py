"""What `import neuralode` gives, and what it does not drag in."""

from __future__ import annotations

import subprocess
import sys

import neuralode

NAMES = {
    "ODEBlock", "Solution", "SolveError", "SolverConfig", "Stats", "Status", "UsageError", "load", "odeint",
    "odeint_adjoint",
    "odeint_dense", "odeint_event", "register_field", "solve",
}  # fmt: skip


def test_public_names() -> None:
    assert set(neuralode.__all__) == NAMES
    for name in NAMES:
        assert getattr(neuralode, name).__doc__, f"{name} has no docstring"


def test_import_is_light() -> None:
    code = "import neuralode, sys; print([m for m in ('matplotlib', 'lightning', 'hydra') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
