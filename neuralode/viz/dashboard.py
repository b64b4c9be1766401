"""The layout of TensorBoard's custom-scalars tab, as data."""

from __future__ import annotations

Layout = dict[str, dict[str, list]]

SOLVER = {
    "evaluations of the field": ["Multiline", [r"solver/nfe_forward", r"solver/nfe_backward"]],
    "steps": ["Multiline", [r"solver/accepted_steps", r"solver/rejected_steps"]],
    "step size": ["Multiline", [r"solver/step_size_min", r"solver/step_size_mean", r"solver/step_size_max"]],
    "share of the training step spent in the forward solve": ["Multiline", [r"solver/forward_time_share"]],
}

FLOW = {
    "loss on the probe: SGD, gradient flow, descent": ["Multiline", [r"flow/loss$"]],
    "distance from the gradient flow": ["Multiline", [r"flow/distance$"]],
    "sharpness and the threshold of stability": ["Multiline", [r"flow/sharpness$", r"flow/threshold$"]],
    "stability ratio: 1 is the edge": ["Multiline", [r"flow/stability$"]],
    "defect of a step, relative to its length": ["Multiline", [r"flow/defect_relative$"]],
    "acceleration and jerk": ["Multiline", [r"flow/acceleration$", r"flow/jerk$"]],
    "what the flow's loss falls by in a step": ["Multiline", [r"flow/rate$"]],
}


def layout(metric: str, solves: bool, flows: bool = False) -> Layout:
    """The charts of a run.

    Args:
        metric: the task's own metric, shown beside the loss.
        solves: whether the model contains ODEBlocks.
        flows: whether the gradient flow is watched.
    """
    training = {name: ["Multiline", [rf"train/{name}$", rf"val/{name}$"]] for name in dict.fromkeys(["loss", metric])}
    training["learning rate"] = ["Multiline", [r"lr-.*"]]
    return {"training": training} | ({"gradient flow": FLOW} if flows else {}) | ({"solver": SOLVER} if solves else {})
