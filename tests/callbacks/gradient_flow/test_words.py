"""What the numbers mean, in words."""

from __future__ import annotations

import math

import pytest
import torch

from neuralode.callbacks.gradient_flow.words import formula, in_words, name_of
from neuralode.gradient_flow import update_rules

NAN, INF = math.nan, math.inf


def said(ratio: float, steps_to_edge: float = INF, rate: float = NAN, fall: float = NAN) -> str:
    return in_words(120, 200 * ratio, 200.0, "2/η", steps_to_edge, rate, fall)


@pytest.mark.parametrize(
    ("ratio", "relation", "expectation"),
    [
        (0.3, "is below 2/η = 200", "stable, far from the edge"),
        (0.7, "is below", "; stable."),
        (0.9, "is below", "near the edge of stability"),
        (1.0, "is about at 2/η", "expect oscillation along the top eigenvector"),
        (1.2, "is beyond 2/η", "expect oscillation along the top eigenvector"),
        (-0.1, "is below", "the loss curves downwards in every direction"),
        (NAN, "is below", "the training has diverged"),
        (INF, "is beyond", "the training has diverged"),
    ],
)
def test_relation_and_expectation(ratio: float, relation: str, expectation: str) -> None:
    words = said(ratio)
    assert words.startswith("**step 120**: sharpness ")
    assert relation in words
    assert expectation in words
    assert words.endswith(".")


def test_no_curvature_and_no_threshold_are_not_a_downward_curve() -> None:
    assert "downwards" not in said(0.0)
    assert "downwards" not in in_words(0, 3.0, INF, "2/η", INF, NAN, NAN)  # a warm-up that begins at η = 0


def test_steps_to_the_edge() -> None:
    assert "reaches the edge in about 42 steps" in said(0.5, steps_to_edge=42.4)
    for words in (said(0.5), said(0.5, 10_001.0), said(1.2, 10.0)):
        assert "reaches the edge" not in words


def test_pace() -> None:
    assert said(0.3, rate=0.0123).endswith("The flow would fall at 0.012 a step.")
    assert said(0.3, rate=0.0123, fall=0.5).endswith("The flow would fall at 0.012 a step, SGD falls at 0.5.")
    assert "fall" not in said(0.3, fall=0.5)
    adam = in_words(1, 1.0, 2.0, "x", INF, 1.0, 1.0, "Adam")
    assert "Adam falls at 1." in adam


@pytest.mark.parametrize(
    ("make", "name", "threshold"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "SGD", "2/η"),
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1), "SGD", "2/η − w"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "SGD", "(2+2β)/η"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), "SGD", "(2+2β)/(η(1+2β))"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5), "SGD", "(2+2β)/(η(1−d))"),
        (lambda p: torch.optim.Adam(p, 0.1), "Adam", "(2+2β₁)/(η(1−β₁))"),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1), "AdamW", "(1+β₁)(2−ηw)/(η(1−β₁))"),
        (lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0), "AdamW", "(2+2β₁)/(η(1−β₁))"),
    ],
)
def test_name_and_threshold_of_an_optimiser(make: object, name: str, threshold: str) -> None:
    rules = update_rules(make([torch.nn.Parameter(torch.zeros(1))]))  # type: ignore[operator]
    assert (name_of(rules), formula(rules)) == (name, threshold)
