"""What the numbers mean now, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from neuralode.gradient_flow import UpdateRule

_NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}

_FORESEEABLE = 10_000
"""Steps beyond which an extrapolation is not worth a sentence."""


def in_words(step: int, sharpness: float, threshold: float, formula: str, steps_to_edge: float,
             flow_rate: float, fall: float, name: str = "SGD") -> str:  # fmt: skip
    """The text card: how close to the edge of stability, and how fast the loss falls.

    Args:
        threshold: of the optimiser; `formula` is how it is written, for example `2/η`.
        steps_to_edge: extrapolated; infinite if the sharpness does not rise.
        flow_rate: what the flow's loss falls by in a step.
        fall: what the run's own probe loss fell by in a step lately; nan if not known.
        name: of the optimiser.
    """
    ratio = sharpness / threshold
    edge = f"sharpness {sharpness:.3g} {_relation(ratio)} {formula} = {threshold:.3g}"
    sentences = [f"**step {step}**: {edge}; {_expectation(ratio)}."]
    if ratio < 1 and steps_to_edge <= _FORESEEABLE:
        sentences.append(f"At its present pace the sharpness reaches the edge in about {steps_to_edge:.0f} steps.")
    if math.isfinite(flow_rate):
        pace = f"The flow would fall at {flow_rate:.2g} a step"
        moves = "falls" if fall >= 0 else "rises"
        sentences.append(f"{pace}, {name} {moves} at {abs(fall):.2g}." if math.isfinite(fall) else f"{pace}.")
    return " ".join(sentences)


def _relation(ratio: float) -> str:
    if ratio > 1.02:
        return "is beyond"
    return "is about at" if ratio >= 0.98 else "is below"


def _expectation(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "the training has diverged"
    if ratio >= 0.98:
        return "expect oscillation along the top eigenvector"
    if ratio >= 0.8:
        return "near the edge of stability"
    if ratio < 0:
        return "the loss curves downwards in every direction, so no step is too long for it"
    return "stable, far from the edge" if ratio < 0.5 else "stable"


def formula(rules: Sequence[UpdateRule]) -> str:
    """How the threshold of an optimiser is written."""
    rule = rules[0]
    decay = " − w" if rule.weight_decay else ""
    if rule.kind == "adam":
        return "(2+2β₁)/(η(1−β₁))"
    if rule.kind == "adamw":
        return "(1+β₁)(2−ηw)/(η(1−β₁))" if decay else "(2+2β₁)/(η(1−β₁))"
    if not rule.momentum:
        return f"2/η{decay}"
    return f"(2+2β)/(η(1+2β)){decay}" if rule.nesterov else f"(2+2β)/{'(η(1−d))' if rule.dampening else 'η'}{decay}"


def name_of(rules: Sequence[UpdateRule]) -> str:
    """The optimiser's name."""
    return _NAMES[rules[0].kind]
