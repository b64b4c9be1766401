"""The layout of TensorBoard's custom-scalars tab, as data."""

from __future__ import annotations

Layout = dict[str, dict[str, list]]

SOLVER = {
    "evaluations of the field": ["Multiline", [r"solver/nfe_forward", r"solver/nfe_backward"]],
    "steps": ["Multiline", [r"solver/accepted_steps", r"solver/rejected_steps"]],
    "step size": ["Multiline", [r"solver/step_size_min", r"solver/step_size_mean", r"solver/step_size_max"]],
    "share of the training step spent in the forward solve": ["Multiline", [r"solver/forward_time_share"]],
}


def layout(metric: str, solves: bool) -> Layout:
    """The charts of a run.

    Args:
        metric: the task's own metric, shown beside the loss.
        solves: whether the model contains ODEBlocks.
    """
    training = {name: ["Multiline", [rf"train/{name}$", rf"val/{name}$"]] for name in dict.fromkeys(["loss", metric])}
    training["learning rate"] = ["Multiline", [r"lr-.*"]]
    return {"training": training} | ({"solver": SOLVER} if solves else {})
