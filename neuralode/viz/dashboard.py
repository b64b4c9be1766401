"""The layout of TensorBoard's custom-scalars tab, as data."""

from __future__ import annotations

LAYOUT = {
    "training": {
        "loss": ["Multiline", [r"train/loss$", r"val/loss$"]],
        "accuracy": ["Multiline", [r"train/accuracy$", r"val/accuracy$"]],
        "trajectory error": ["Multiline", [r"train/mae$", r"val/mae$"]],
        "learning rate": ["Multiline", [r"lr-.*"]],
    },
    "solver": {
        "evaluations of the field": ["Multiline", [r"solver/nfe_forward", r"solver/nfe_backward"]],
        "steps": ["Multiline", [r"solver/accepted_steps", r"solver/rejected_steps"]],
        "step size": ["Multiline", [r"solver/step_size_min", r"solver/step_size_mean", r"solver/step_size_max"]],
        "share of the step spent in the forward solve": ["Multiline", [r"solver/forward_time_share"]],
    },
}
