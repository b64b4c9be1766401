"""Training as a flow in continuous time: dθ/ds = −∇L(θ), of which gradient descent is the Euler method.

Usable with any module and any training loop; the Lightning callback `GradientFlowMonitor` is made of it.
"""

from neuralode.gradient_flow.derivatives import Derivatives, derivatives
from neuralode.gradient_flow.field import GradientField
from neuralode.gradient_flow.flow import Path, flow, modified
from neuralode.gradient_flow.optimizer_flow import OptimizerFlow, follow
from neuralode.gradient_flow.optimizer_state import OptimizerState, Replica, capture
from neuralode.gradient_flow.plane import Plane, plane
from neuralode.gradient_flow.sharpness import Eigenpair, Sharpness, lanczos
from neuralode.gradient_flow.stability import Stability, stability
from neuralode.gradient_flow.update_rule import UpdateRule, update_rules

__all__ = [
    "Derivatives",
    "Eigenpair",
    "GradientField",
    "OptimizerFlow",
    "OptimizerState",
    "Path",
    "Plane",
    "Replica",
    "Sharpness",
    "Stability",
    "UpdateRule",
    "capture",
    "derivatives",
    "flow",
    "follow",
    "lanczos",
    "modified",
    "plane",
    "stability",
    "update_rules",
]
