"""Which methods there are, read from torchdiffeq at run time: its releases differ in what they carry."""

from __future__ import annotations

from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from neuralode.errors import UsageError, unknown


def methods() -> list[str]:
    """The names of all methods that `solve` and `odeint` take."""
    return sorted(SOLVERS)


def check_method(name: str) -> None:
    """Raises UsageError for a method that does not exist, naming the nearest one that does."""
    if name not in SOLVERS:
        raise UsageError(unknown("method", name, SOLVERS))


def takes_fixed_steps(name: str) -> bool:
    """True for a method without error control, whose step size the caller chooses."""
    return issubclass(SOLVERS[name], FixedGridODESolver)


def supported_callbacks(name: str) -> set[str]:
    """The step callbacks that torchdiffeq calls for this method."""
    return set(SOLVERS[name].valid_callbacks())
