"""What accuracy costs with each of our methods: `python benchmarks/work_precision.py [docs/work_precision.png]`.

The error at the end of a solve against evaluations of f and against time, in float64, on two problems whose solution
is known: a Kepler orbit, which is smooth, and a stiff equation of Prothero and Robinson. Methods with error control
sweep the tolerance (rtol = atol), the others their step size. Takes about a minute.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

import neuralode
from neuralode.ode.methods import METHODS
from neuralode.viz.style import COLOURS, GREY, STYLE

MOST_EVALUATIONS, MOST_SECONDS = 10_000, 1.0
"""A sweep ends at the first solve that takes more."""
WORST, BEST = 1.0, 1e-13
"""Errors outside are not drawn: solves that went astray, and rounding."""


@dataclass(frozen=True)
class Problem:
    name: str
    field: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    start: list[float]
    end: float
    solution: list[float]
    """The exact state at the end."""
    fewest_steps: int
    """Where a sweep of step sizes begins."""


@dataclass(frozen=True)
class Point:
    """One solve."""

    error: float
    evaluations: int
    seconds: float


def kepler(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Motion about a unit mass; y is position and velocity in the plane."""
    return torch.cat([y[2:], -y[:2] / torch.linalg.vector_norm(y[:2]) ** 3])


STIFFNESS = 100.0


def prothero_robinson(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pulled towards cos t at a high rate; y = cos t is a solution (Prothero and Robinson 1974)."""
    return -STIFFNESS * (y - torch.cos(t)) - torch.sin(t)


ECCENTRICITY = 0.3
# from the pericentre of an ellipse with half-axis 1, whose period is 2π
PERICENTRE = [1 - ECCENTRICITY, 0.0, 0.0, math.sqrt((1 + ECCENTRICITY) / (1 - ECCENTRICITY))]
PROBLEMS = [
    Problem(f"Kepler orbit, eccentricity {ECCENTRICITY}, one period", kepler, PERICENTRE, 2 * math.pi, PERICENTRE, 16),
    Problem(
        f"Prothero–Robinson, ẏ = −{STIFFNESS:.0f} (y − cos t) − sin t, t to 5",
        prothero_robinson,
        [1.0],
        5.0,
        [math.cos(5.0)],
        100,
    ),
]


def solved(problem: Problem, method: str, **settings: Any) -> Point:
    """The least time of three solves, or of one if it is long; an error of infinity for a solve that fails."""
    start = torch.tensor(problem.start, dtype=torch.float64)
    exact = torch.tensor(problem.solution, dtype=torch.float64)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        solution = neuralode.solve(
            problem.field,
            start,
            [0.0, problem.end],
            method=method,
            engine="stepper",
            max_steps=MOST_EVALUATIONS,
            throw=False,
            **settings,
        )
        seconds.append(time.perf_counter() - began)
        if seconds[-1] > MOST_SECONDS / 5:
            break
    error = float((solution.final - exact).norm() / exact.norm())
    return Point(error if math.isfinite(error) else math.inf, solution.stats.nfe, min(seconds))


@torch.no_grad()
def sweep(problem: Problem, method: str) -> list[Point]:
    """From crude to fine, until it takes too long or reaches rounding."""
    if METHODS[method].adaptive:
        settings = [{"rtol": 10 ** (-k / 2), "atol": 10 ** (-k / 2)} for k in range(4, 26)]
    else:
        settings = [{"step_size": problem.end / (problem.fewest_steps * 2 ** (k / 2))} for k in range(24)]
    solved(problem, method, **settings[0])  # what a first call sets up is no part of a solve
    points = []
    for setting in settings:
        points.append(last := solved(problem, method, **setting))
        if last.evaluations > MOST_EVALUATIONS or last.seconds > MOST_SECONDS or last.error < BEST:
            break
    return points


FAMILIES: dict[str, tuple[str, list[str]]] = {
    "order 1": (GREY, ["euler"]),
    "order 2": (COLOURS[5], ["midpoint", "heun2", "ralston", "adaptive_heun", "fehlberg2"]),
    "order 3": (COLOURS[4], ["heun3", "bosh3"]),
    "order 4": (COLOURS[2], ["rk4", "rk4_classic"]),
    "order 5": (COLOURS[0], ["dopri5", "tsit5"]),
    "order 8": (COLOURS[6], ["dopri8", "dop853"]),
    "for stiff problems": (COLOURS[1], ["rkc2", "esdirk4"]),
}
MARKERS = "osD^v"


def looks() -> dict[str, dict[str, Any]]:
    """How each method is drawn: colour by family, marker within it, dashes for fixed steps."""
    families = dict(FAMILIES)
    placed = {name for _, names in families.values() for name in names}
    if others := [name for name in METHODS if name not in placed]:
        families["others"] = (COLOURS[3], others)
    return {
        name: {
            "color": colour,
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": "-" if METHODS[name].adaptive else (0, (3, 2)),
            "markersize": 3.5,
            "linewidth": 1.2,
            "markerfacecolor": colour if METHODS[name].adaptive else "white",
        }
        for colour, names in families.values()
        for place, name in enumerate(names)
    }


def draw(results: dict[str, dict[str, list[Point]]]) -> Figure:
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        rows = figure.subplots(len(results), 2, sharey="row")
        for axes, (problem, methods) in zip(rows, results.items(), strict=True):
            for name, look in looks().items():
                points = [point for point in methods[name] if BEST <= point.error <= WORST]
                error = [point.error for point in points]
                axes[0].plot([point.evaluations for point in points], error, **look)
                axes[1].plot([1e3 * point.seconds for point in points], error, **look)
            label(axes, problem)
        figure.legend(handles=legend(), loc="outside right center", handlelength=3.2)
    return figure


def label(axes: list[Axes], problem: str) -> None:
    axes[0].set_title(problem, loc="left")
    axes[0].set(xlabel="evaluations of f", ylabel="relative error at the end")
    axes[1].set(xlabel="time [ms]")
    for one in axes:
        one.set(xscale="log", yscale="log")
        one.yaxis.set_minor_locator(NullLocator())
        one.xaxis.set_minor_formatter(NullFormatter())  # on a short axis its labels would overlap
        one.grid(color="0.9", linewidth=0.6)
        one.set_axisbelow(True)


def legend() -> list[Line2D]:
    """The methods by family, under headings, and what dashes mean."""
    handles, styles = [], looks()
    rest = [name for name in METHODS if not any(name in names for _, names in FAMILIES.values())]
    for heading, names in [*((h, n) for h, (_, n) in FAMILIES.items()), *([("others", rest)] if rest else [])]:
        handles.append(Line2D([], [], linestyle="none", label=rf"$\bf{{{heading.replace(' ', '~')}}}$"))
        handles += [Line2D([], [], label=name, **styles[name]) for name in names if name in METHODS]
    handles.append(Line2D([], [], linestyle="none", label=""))
    handles.append(Line2D([], [], color="0.3", linestyle="-", label="error control"))
    handles.append(Line2D([], [], color="0.3", linestyle=(0, (3, 2)), label="fixed steps"))
    return handles


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/work_precision.png")
    torch.set_num_threads(1)  # states this small have nothing to share
    results: dict[str, dict[str, list[Point]]] = {}
    for problem in PROBLEMS:
        results[problem.name] = {}
        for method in METHODS:
            print(f"{problem.name}: {method} ...", file=sys.stderr)
            results[problem.name][method] = sweep(problem, method)
    draw(results).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
