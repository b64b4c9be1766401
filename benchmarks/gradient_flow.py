"""Gradients that it takes to follow a network's gradient flow: `python benchmarks/gradient_flow.py [digits] [edge]`.

The flow dθ/ds = -∇L(θ) in float64, full batch: of a 64-64-64-10 tanh network on 1000 of scikit-learn's digits up to
s = 200 (`digits`), and of the experiment `edge_of_stability` over its whole 4000 steps, s = 1600 (`edge`). An error is
the distance to a fine solution, over how far the flow has gone. A product of the Hessian with a vector (HVP), which
only the estimate of λ takes, is a difference of two gradients here; `all` counts both of them. `digits` takes half a
minute on two cores, `edge` about four.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from torch import nn

from neuralode.gradient_flow import GradientField, Sharpness, flow
from neuralode.ode import solve


@dataclass
class Problem:
    """A field, its start and how far to follow it; counts the products that its estimates of λ take."""

    hidden: tuple[int, ...]
    in_float32: bool
    """Whether the weights are drawn in float32, which are others than those drawn in float64."""
    rate: float
    """Learning rate of the descent that the flow stands for."""
    span: float
    """Flow time."""
    tolerances: Sequence[float]
    products: int = 0

    def __post_init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images) / 16
        target = nn.functional.one_hot(torch.tensor(labels[:1000]), 10).double()
        torch.manual_seed(0)
        widths = (64, *self.hidden, 10)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            dtype = torch.float32 if self.in_float32 else torch.float64
            layers += [nn.Linear(before, after, dtype=dtype), nn.Tanh()]
        network = nn.Sequential(*layers[:-1]).double()
        self.field = GradientField(network, squared, ((x - x.mean(0))[:1000], target))
        self.start = self.field.theta

    def largest(self, sharpness: Sharpness, theta: torch.Tensor) -> float:
        """λ, the largest |eigenvalue|."""

        def product(v: torch.Tensor) -> torch.Tensor:
            self.products += 1
            return self.field.product(theta, v)

        return sharpness(product, theta).radius


def squared(network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """½‖·‖², summed over classes, mean over samples."""
    return (network(batch[0]) - batch[1]).square().sum(1).mean() / 2


PROBLEMS = {
    "digits": Problem((64, 64), False, 0.07, 200.0, (1e-2, 1e-3, 1e-4, 5.9e-5)),
    "edge": Problem((32, 32), True, 0.4, 1600.0, (1e-2, 1e-3, 1e-4, 1e-5)),
}


def rk4(problem: Problem, every: int = 20) -> torch.Tensor:
    """Steps of 1/λ, as the literature's code takes them; λ is taken anew every so many steps."""
    sharpness, theta, s = Sharpness(), problem.start, 0.0
    while s < problem.span:
        h = 1 / problem.largest(sharpness, theta)
        end = min(s + every * h, problem.span)
        theta = solve(problem.field, theta, [s, end], method="rk4_classic", step_size=h).final
        s = end
    return theta


def rkc2(problem: Problem, rtol: float) -> torch.Tensor:
    """The monitor's method, with its estimate of λ."""
    estimate = Sharpness(first_products=8)

    def radius(s: float, theta: torch.Tensor) -> float:
        return 1.03 * problem.largest(estimate, theta)

    options = {"spectral_radius": radius}
    found = solve(
        problem.field, problem.start, [0.0, problem.span], method="rkc2", rtol=rtol, atol=rtol / 100, options=options,
        max_steps=10**6,
    )  # fmt: skip
    return found.final


def adaptive(problem: Problem, method: str, rtol: float) -> torch.Tensor:
    path = flow(problem.field, problem.start, [0.0, problem.span], method=method, rtol=rtol, max_steps=10**6)
    return path.thetas[-1]


def descent(problem: Problem) -> torch.Tensor:
    theta = problem.start
    for k in range(round(problem.span / problem.rate) + 1):
        theta = theta - max(0.0, min(problem.rate, problem.span - k * problem.rate)) * problem.field.gradient(theta)
    return theta


@torch.no_grad()
def table(name: str, known: Problem) -> None:
    arms: dict[str, Callable[[Problem], torch.Tensor]] = {
        "rk4_classic, step 1/λ": rk4,
        "dopri5, rtol 1e-3": lambda p: adaptive(p, "dopri5", 1e-3),
    }
    arms |= {f"rkc2, rtol {rtol:g}": functools.partial(rkc2, rtol=rtol) for rtol in known.tolerances}
    arms[f"gradient descent, η = {known.rate}"] = descent
    print(f"{name}: reference ...", file=sys.stderr)
    with known.field.borrowed():
        fine = adaptive(known, "dop853", 1e-8)
        gone = float((fine - known.start).norm())
    print(f"\n{name}, s = {known.span:g}\n\n| method | gradients | HVPs | all | error | seconds |")
    print("|---|---|---|---|---|---|")
    for label, arm in arms.items():
        print(f"{label} ...", file=sys.stderr)
        problem = replace(known, products=0)
        began = time.perf_counter()
        with problem.field.borrowed():
            error = float((arm(problem) - fine).norm()) / gone
        seconds = time.perf_counter() - began
        every, products = problem.field.gradients, problem.products
        print(
            f"| {label} | {every - 2 * products} | {products or '–'} | {every} | {error:.1e} | {seconds:.1f} |",
            flush=True,
        )


def main() -> None:
    for name in sys.argv[1:] or PROBLEMS:
        table(name, PROBLEMS[name])


if __name__ == "__main__":
    main()
