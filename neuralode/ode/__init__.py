"""Solve dy/dt = f(t, y) and differentiate the solution."""

from neuralode.ode.controllers import Controller
from neuralode.ode.methods import methods
from neuralode.ode.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from neuralode.ode.solution import Events, Solution, SolveError, Stats, Status
from neuralode.ode.solve import solve, solve_configured
from neuralode.ode.solver_config import SolverConfig

__all__ = [
    "Controller",
    "Events",
    "Solution",
    "SolveError",
    "SolverConfig",
    "Stats",
    "Status",
    "methods",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
    "solve_configured",
]
