"""Which methods there are: ours, and torchdiffeq's, read at run time since its releases differ in what they carry."""

from __future__ import annotations

import functools
import inspect

from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from neuralode.errors import UsageError, unknown
from neuralode.ode import tableaus, tableaus_order8
from neuralode.ode.chebyshev import RKC2
from neuralode.ode.explicit import Method, RungeKutta
from neuralode.ode.implicit import ESDIRK4

_TABLEAUS = [
    tableaus.EULER, tableaus.MIDPOINT, tableaus.HEUN2, tableaus.RALSTON, tableaus.HEUN3, tableaus.RK4,
    tableaus.RK4_CLASSIC, tableaus.ADAPTIVE_HEUN, tableaus.FEHLBERG2, tableaus.BOSH3, tableaus.DOPRI5,
    tableaus.TSIT5, tableaus_order8.DOPRI8, tableaus_order8.DOP853,
]  # fmt: skip

METHODS: dict[str, Method] = {
    **{tableau.name: RungeKutta(tableau) for tableau in _TABLEAUS},
    **{method.name: method for method in (RKC2(), ESDIRK4())},
}
"""The methods that the stepper has."""

OPTIONS_OF_FIXED_STEPS = frozenset({"step_size", "grid_constructor", "norm"})
OPTIONS_OF_ADAPTIVE_STEPS = frozenset({
    "first_step", "max_num_steps", "safety", "ifactor", "dfactor", "norm", "steps_per_sync",
})  # fmt: skip
"""Options that the stepper takes besides those that are a method's own."""


def methods() -> list[str]:
    """The names of all methods that `solve` and `odeint` take."""
    return sorted({*METHODS, *SOLVERS})


def check_method(name: str) -> None:
    """Raises UsageError for a method that does not exist, naming the nearest one that does."""
    if name not in METHODS and name not in SOLVERS:
        raise UsageError(unknown("method", name, methods()))


def in_torchdiffeq(name: str) -> bool:
    return name in SOLVERS


def takes_fixed_steps(name: str) -> bool:
    """True for a method without error control, whose step size the caller chooses."""
    return not METHODS[name].adaptive if name in METHODS else issubclass(SOLVERS[name], FixedGridODESolver)


@functools.cache
def options_of(name: str) -> frozenset[str]:
    """The options that a method takes, of the stepper's or of torchdiffeq's."""
    ours = frozenset[str]()
    if name in METHODS:
        ours = METHODS[name].options | (
            OPTIONS_OF_FIXED_STEPS if takes_fixed_steps(name) else OPTIONS_OF_ADAPTIVE_STEPS
        )
    inits = [inspect.signature(kind.__init__).parameters for kind in (SOLVERS[name].__mro__ if name in SOLVERS else ())]
    theirs = {x.name for parameters in inits for x in parameters.values() if x.default is not x.empty}
    return ours | (theirs - {"rtol", "atol", "implicit"}) | {"norm"}


def supported_callbacks(name: str) -> set[str]:
    """The step callbacks that torchdiffeq calls for this method."""
    return set(SOLVERS[name].valid_callbacks())
