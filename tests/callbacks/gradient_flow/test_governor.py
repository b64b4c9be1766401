"""Which measurement is due and can be afforded, under a clock that the tests move."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from neuralode.callbacks.gradient_flow.governor import Governor
from neuralode.errors import UsageError

CADENCES = {"defect": 5, "sharpness": 20, "paths": 20, "figures": 200}
WEIGHTS = {"defect": 1.0, "sharpness": 2.0, "paths": 3.0, "figures": 1.0}
OWN_TURN = {"sharpness", "paths", "figures"}
STEP = 0.01


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A training of steps that take `STEP` seconds, and what was measured in it."""

    def __init__(
        self, budget: float | None, costs: dict[str, Callable[[], float]], at_end: str = "", step: float = STEP
    ):
        self.clock, self.costs, self.seconds = Clock(), costs, step
        self.governor = Governor(CADENCES, WEIGHTS, budget, at_end, self.clock)
        self.made: list[tuple[int, str]] = []
        self.step = 0

    def measure(self, kind: str) -> None:
        with self.governor.measuring(kind, self.step):
            self.clock.now += self.costs[kind]()
        self.made.append((self.step, kind))

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            self.clock.now += self.seconds
            if "defect" in self.costs and self.governor.allows("defect", self.step):
                self.measure("defect")
            while (kind := self.governor.choose(self.step, OWN_TURN & self.costs.keys())) is not None:
                self.measure(kind)
        return self

    def steps_of(self, kind: str) -> list[int]:
        return [step for step, made in self.made if made == kind]


def constant(**costs: float) -> dict[str, Callable[[], float]]:
    return {kind: lambda cost=cost: cost for kind, cost in costs.items()}  # type: ignore[misc]


def test_cadences_are_kept_where_all_is_cheap() -> None:
    run = Run(0.1, constant(defect=1e-5, sharpness=1e-4, paths=1e-4, figures=1e-4)).go(1000)
    for kind in ("defect", "sharpness", "paths"):
        gaps = {b - a for a, b in zip(run.steps_of(kind), run.steps_of(kind)[1:], strict=False)}
        assert gaps == {CADENCES[kind]}, kind
    assert run.governor.cadences_reached()["sharpness"] == 20


def test_the_dear_is_stretched_and_the_cheap_is_not() -> None:
    # 0.15 s at 10 % of steps of 0.01 s is one in 150 steps, seven times the cadence
    run = Run(0.1, constant(defect=1e-5, paths=0.15)).go(3000)
    reached = run.governor.cadences_reached()
    assert reached["defect"] == 5
    assert 150 <= reached["paths"] <= 165


def test_the_dear_is_not_starved_by_the_cheap() -> None:
    # sharpness alone would use the whole budget at its cadence: 0.02 s in 20 steps of 0.01 s
    run = Run(0.1, constant(sharpness=0.02, paths=0.5)).go(20_000)
    spent = {kind: len(run.steps_of(kind)) * cost for kind, cost in (("sharpness", 0.02), ("paths", 0.5))}
    assert spent["paths"] / spent["sharpness"] == pytest.approx(WEIGHTS["paths"] / WEIGHTS["sharpness"], rel=0.15)


@pytest.mark.parametrize("seed", range(20))
def test_the_total_stays_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.choice([0.02, 0.1, 0.5])
    most = {kind: 10 ** draw.uniform(-4, 0) for kind in CADENCES}
    costs = {kind: lambda top=top: draw.uniform(0.5, 1) * top for kind, top in most.items()}
    run = Run(budget, costs, at_end="figures")
    for kind, cost in most.items():
        run.governor.expect(kind, cost)
    for _ in range(40):
        run.go(100)
        training = run.step * STEP
        # beyond it goes only what a measurement cost more than the one before it, and the defect's own eighth
        beyond = 0.5 * (max(most.values()) + most["figures"]) + budget * training / 7
        assert run.governor.spent <= budget * training + beyond
    run.measure("figures")
    assert run.governor.overhead <= budget * 8 / 7 + (max(most.values()) + most["figures"]) / training


@pytest.mark.parametrize("seed", range(10))
def test_known_costs_never_exceed_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    costs = {kind: 10 ** draw.uniform(-4, 0) for kind in ("sharpness", "paths", "figures")}
    run = Run(0.1, constant(**costs), at_end="figures")
    for kind, cost in costs.items():
        run.governor.expect(kind, cost)
    for _ in range(300):
        run.go(10)
        # what the end takes is kept back
        assert run.governor.spent + costs["figures"] <= 0.1 * run.step * STEP + 1e-9 or not run.made


def test_what_cannot_wait_keeps_to_its_own_part() -> None:
    run = Run(0.1, constant(defect=0.05)).go(2000)
    part = WEIGHTS["defect"] / sum(WEIGHTS.values())
    assert len(run.steps_of("defect")) >= 4
    assert run.governor.spent <= part * 0.1 * run.step * STEP + 0.05


def test_no_limit() -> None:
    run = Run(None, constant(defect=1.0, sharpness=10.0, paths=100.0)).go(100)
    assert run.governor.cadences_reached() == {"defect": 5, "sharpness": 20, "paths": 20}
    assert run.governor.overhead > 100


def test_time_without_an_end_counts_but_leaves_the_measurement_due() -> None:
    run = Run(None, {})
    for _ in range(2):
        with run.governor.measuring("paths", 3, ends=False):
            run.clock.now += 0.25
    assert run.governor.spent == 0.5
    assert run.governor.choose(3, {"paths"}) == "paths"
    with run.governor.measuring("paths", 3):
        run.clock.now += 0.25
    assert run.governor.choose(22, {"paths"}) is None
    assert run.governor.choose(23, {"paths"}) == "paths"


def test_time_counts_when_a_measurement_fails() -> None:
    run = Run(0.1, {})
    run.costs["paths"] = lambda: setattr(run.clock, "now", 2.0) or 1 // 0  # type: ignore[func-returns-value]
    with pytest.raises(ZeroDivisionError):
        run.measure("paths")
    assert run.governor.spent == 2.0


@pytest.mark.parametrize("after", [7, 300, 911])
def test_state_goes_on_where_it_was(after: int) -> None:
    # powers of two, for sums of seconds that are exact
    costs = constant(defect=2**-10, sharpness=2**-5, paths=2**-2, figures=2**-3)
    whole, first, second = (Run(0.25, costs, at_end="figures", step=2**-7) for _ in range(3))
    whole.go(1500)
    first.go(after)
    second.clock.now, second.step = 1024.0, after  # another process has another clock
    second.governor.load_state_dict(json.loads(json.dumps(first.governor.state_dict())))
    second.go(1500 - after)
    assert first.made + second.made == whole.made
    assert second.governor.overhead == pytest.approx(whole.governor.overhead)


def test_report() -> None:
    run = Run(None, constant(defect=0.01, sharpness=0.02), "figures").go(25)
    run.governor.expect("paths", 3.0)
    words = run.governor.report()
    # 5 defects and 2 sharpnesses: 0.09 s beside 0.25 s of training
    assert words.startswith("36.0 % of the training's time: ")
    assert "defect every 5 steps (asked: 5)" in words
    assert "paths never, for it would have cost 3.0 s" in words
    assert "figures" not in words  # those of the end say nothing of cadences
    assert "raise the budget (monitor.flow_budget)" in words
    assert "raise" not in Run(None, constant(defect=0.0, sharpness=0.0, paths=0.0, figures=0.0)).go(5).governor.report()
    assert "paths once" in Run(None, constant(paths=0.0)).go(5).governor.report()


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_refuses_a_budget_that_is_none(budget: float) -> None:
    with pytest.raises(UsageError, match=r"flow_budget is .* null for no limit"):
        Governor(CADENCES, WEIGHTS, budget)


def test_refuses_a_cadence_of_zero() -> None:
    with pytest.raises(UsageError, match="cadence of paths is 0"):
        Governor({"paths": 0}, WEIGHTS, 0.1)
