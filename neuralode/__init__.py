"""Train neural ODEs in PyTorch.

Importing this package brings torch and torchdiffeq, and neither Lightning, Hydra nor matplotlib.
"""

from neuralode.errors import UsageError
from neuralode.models import load, register_field
from neuralode.nn import ODEBlock
from neuralode.ode import (
    Solution,
    SolveError,
    SolverConfig,
    Stats,
    Status,
    odeint,
    odeint_adjoint,
    odeint_dense,
    odeint_event,
    solve,
)

__version__ = "0.1.0"

__all__ = [
    "ODEBlock",
    "Solution",
    "SolveError",
    "SolverConfig",
    "Stats",
    "Status",
    "UsageError",
    "load",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "register_field",
    "solve",
]
