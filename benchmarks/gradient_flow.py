"""How many gradients it takes to follow a network's gradient flow: `python benchmarks/gradient_flow.py`.

The flow dθ/ds = -∇L(θ) of a 64-64-64-10 tanh network on 1000 of scikit-learn's digits, full batch, up to s = 200, in
float64. An error is the distance to a fine solution, over how far the flow has gone. A product of the Hessian with a
vector (HVP) is counted apart: by double differentiation it costs about two gradients, by differences of gradients one.
Takes about half a minute on two cores.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn

import neuralode

SPAN = 200.0
"""Flow time."""


class Problem:
    """The loss as a function of the weights in one vector θ, [P]; counts its gradients and HVPs.

    The weights are drawn in float64, which are others than those drawn in float32 from the same seed.
    """

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images) / 16
        self.x = (x - x.mean(0))[:1000]
        self.y = nn.functional.one_hot(torch.tensor(labels[:1000]), 10).double()
        torch.manual_seed(0)
        layers = [nn.Linear(64, width, dtype=torch.float64) for width in (64, 64, 10)]
        parameters = [p.detach() for layer in layers for p in layer.parameters()]
        self.shapes = [p.shape for p in parameters]
        self.start = torch.cat([p.flatten() for p in parameters])
        self.gradients = self.products = 0

    def loss(self, theta: torch.Tensor) -> torch.Tensor:
        parts = theta.split([shape.numel() for shape in self.shapes])
        w1, b1, w2, b2, w3, b3 = (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
        hidden = torch.tanh(torch.tanh(self.x @ w1.T + b1) @ w2.T + b2)
        return (hidden @ w3.T + b3 - self.y).square().sum(1).mean() / 2

    @torch.enable_grad()
    def gradient(self, theta: torch.Tensor) -> torch.Tensor:
        self.gradients += 1
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(theta), theta)[0]

    def flow(self, s: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return -self.gradient(theta)

    @torch.enable_grad()
    def hessian(self, theta: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """v → Hv at θ."""
        theta = theta.detach().requires_grad_()
        slope = torch.autograd.grad(self.loss(theta), theta, create_graph=True)[0]

        def product(v: torch.Tensor) -> torch.Tensor:
            self.products += 1
            return torch.autograd.grad(slope, theta, v, retain_graph=True)[0]

        return product


class Sharpness:
    """The largest |eigenvalue| of the Hessian by Lanczos, which starts where it ended the last time."""

    def __init__(self, problem: Problem, products: int, margin: float):
        self.problem, self.products, self.margin = problem, products, margin
        self.vector: torch.Tensor | None = None

    def __call__(self, s: float, theta: torch.Tensor) -> float:
        count = self.products
        if self.vector is None:
            self.vector, count = torch.randn(len(theta), generator=torch.Generator().manual_seed(0)).double(), 12
        product = self.problem.hessian(theta)
        basis, images = [self.vector / self.vector.norm()], []
        for _ in range(count):
            images.append(product(basis[-1]))
            rest = images[-1]
            for _ in range(2):  # one pass of orthogonalisation leaves rounding errors that the second takes away
                rest = rest - torch.stack(basis).T @ (torch.stack(basis) @ rest)
            basis.append(rest / rest.norm())
        known = torch.stack(basis[:-1])
        values, vectors = torch.linalg.eigh(known @ torch.stack(images).T)
        largest = values.abs().argmax()
        self.vector = vectors[:, largest] @ known
        return self.margin * float(values[largest].abs())


def rk4(problem: Problem, every: int = 20) -> torch.Tensor:
    """Steps of 1/λ; λ is taken anew every so many steps."""
    sharpness, theta, s = Sharpness(problem, products=5, margin=1.0), problem.start, 0.0
    while s < SPAN:
        h = 1 / sharpness(s, theta)
        end = min(s + every * h, SPAN)
        theta = neuralode.solve(problem.flow, theta, [s, end], method="rk4_classic", step_size=h).final
        s = end
    return theta


def adaptive(problem: Problem, method: str, rtol: float, atol: float, **options: object) -> torch.Tensor:
    solution = neuralode.solve(
        problem.flow, problem.start, [0.0, SPAN], method=method, rtol=rtol, atol=atol, options=options, max_steps=10**6
    )
    print(f"{method}: {solution.stats.accepted} steps, {solution.stats.rejected} rejected", file=sys.stderr)
    return solution.final


def rkc2(problem: Problem, rtol: float, atol: float) -> torch.Tensor:
    return adaptive(problem, "rkc2", rtol, atol, spectral_radius=Sharpness(problem, products=3, margin=1.2))


def descent(problem: Problem, rate: float) -> torch.Tensor:
    theta = problem.start
    for k in range(math.ceil(SPAN / rate)):
        theta = theta - min(rate, SPAN - k * rate) * problem.gradient(theta)
    return theta


@torch.no_grad()
def main() -> None:
    arms: dict[str, Callable[[Problem], torch.Tensor]] = {
        "rk4_classic, step 1/λ": rk4,
        "dopri5, rtol 1e-3": lambda p: adaptive(p, "dopri5", 1e-3, 1e-5),
        "rkc2, rtol 1e-2": lambda p: rkc2(p, 1e-2, 1e-4),
        "rkc2, rtol 1e-3": lambda p: rkc2(p, 1e-3, 1e-5),
        "rkc2, rtol 1e-4": lambda p: rkc2(p, 1e-4, 1e-6),
        "rkc2, rtol 3e-5": lambda p: rkc2(p, 3e-5, 3e-7),
        "rkc2, rtol 1e-3, its own estimate of λ": lambda p: adaptive(p, "rkc2", 1e-3, 1e-5),
        "gradient descent, η = 0.07": lambda p: descent(p, 0.07),
    }
    print("reference ...", file=sys.stderr)
    fine = adaptive(problem := Problem(), "dop853", 1e-9, 1e-9)
    gone = float((fine - problem.start).norm())
    print("| method | gradients | HVPs | error | seconds |\n|---|---|---|---|---|")
    for name, arm in arms.items():
        print(f"{name} ...", file=sys.stderr)
        problem, began = Problem(), time.perf_counter()
        error = float((arm(problem) - fine).norm()) / gone
        seconds = time.perf_counter() - began
        print(f"| {name} | {problem.gradients} | {problem.products or '–'} | {error:.1e} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
