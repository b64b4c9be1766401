"""SolverConfig refuses what no solve could use, naming the key, the value and the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from neuralode.errors import UsageError
from neuralode.ode import SolverConfig, methods
from neuralode.ode.methods import takes_fixed_steps


@pytest.mark.parametrize("value", [-1e-3, 0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["rtol", "atol", "adjoint_rtol", "adjoint_atol", "step_size"])
def test_values_that_are_not_positive_numbers(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"solver\.{key} is {value}.*positive"):
        SolverConfig(**{key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "rk5"}, ["unknown method 'rk5'", "'rk4'"]),
        ({"gradient": "exakt"}, ["did you mean 'exact'"]),
        ({"engine": "jax"}, ["unknown engine 'jax'", "torchdiffeq"]),
        ({"options": {"first_stp": 0.1}}, ["unknown option for 'dopri5': 'first_stp'", "did you mean 'first_step'"]),
        ({"method": "tsit5", "options": {"jump_t": [0.5]}}, ["unknown option for 'tsit5': 'jump_t'", "steps_per_sync"]),
        ({"max_steps": 0}, ["solver.max_steps is 0", "at least 1"]),
        ({"max_steps": 1.5}, ["solver.max_steps is 1.5", "whole number"]),
        ({"memory_budget": None}, ["solver.memory_budget is None", "whole number"]),
        ({"memory_budget": -1}, ["solver.memory_budget is -1", "at least 0"]),
        ({"rtol": torch.ones(5)}, ["solver.rtol is a tensor of shape [5]", "positive number"]),
        ({"t_span": [0.0]}, ["solver.t_span is [0.0]", "two different times"]),
        ({"t_span": [1.0, 1.0]}, ["solver.t_span", "two different times"]),
        ({"t_span": [0.0, 1.0, 2.0]}, ["solver.t_span", "two different times"]),
    ],
    ids=str,
)
def test_wrong_values(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        SolverConfig(**values)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [{"t_span": [0.0, math.nan]}, {"t_span": [0.0, math.inf]}, {"rtol": None}, {"max_steps": math.nan}],
    ids=str,
)
def test_values_that_only_a_solve_notices(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        SolverConfig(**values)


@pytest.mark.parametrize("method", methods())
def test_fixed_steps_need_a_step_size(method: str) -> None:
    if takes_fixed_steps(method):
        with pytest.raises(UsageError, match=rf"{method}.*step_size"):
            SolverConfig(method=method)
        grid = {"grid_constructor": lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), 5)}
        assert SolverConfig(method=method, options=grid).step_size is None
    assert SolverConfig(method=method, step_size=0.1).method == method


def test_a_span_may_run_backwards() -> None:
    assert SolverConfig(t_span=[1.0, 0.0]).t_span == [1.0, 0.0]


def test_defaults_are_not_shared() -> None:
    one, other = SolverConfig(), SolverConfig()
    one.t_span[1] = 5.0
    one.options["first_step"] = 0.1
    assert other == SolverConfig()
