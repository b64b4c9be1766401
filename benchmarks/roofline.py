"""How far the CPU's kernels are from what the machine could do: `python benchmarks/roofline.py`.

The floor by operations is the time that the solve's products of matrices and activations would take at rates measured
in the same run: the products of the field's widest layer by `torch.mm`, tanh by `torch.tanh` on data in the cache. A
reverse sweep has twice the products of an evaluation. The floor by bytes is that of writing and reading once what the
forward pass keeps for the backward pass, at the rate of a copy of that size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import Workload, loss_of
from solve import header, workloads
from torch import nn

from neuralode.kernels.cpu import CPUSolve
from neuralode.ode import SolverConfig, solve_configured


class Floor(NamedTuple):
    """Milliseconds that a training step's solve takes at least."""

    products: float
    activations: float
    bytes: float

    @property
    def operations(self) -> float:
        return self.products + self.activations


def seconds(run: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def floor(work: Workload, evaluations: int, sweeps: int, kept_bytes: int) -> Floor:
    rows = work.shape[0]
    layers = [layer for layer in work.field.modules() if isinstance(layer, nn.Linear)]
    multiplied = sum(layer.weight.numel() for layer in layers)
    activated = sum(layer.out_features for layer in layers[:-1])
    widest = max(layers, key=lambda layer: layer.weight.numel())
    x = torch.randn(max(rows, 256), widest.in_features)
    weight = widest.weight.detach().t().contiguous()
    rate = x.shape[0] * widest.weight.numel() / seconds(lambda: torch.mm(x, weight))  # multiplications a second
    values = torch.randn(rows, max(activated, 1))
    tanh = seconds(lambda: torch.tanh(values)) / values.numel()
    memory = torch.empty(max(kept_bytes, 64) // 4)
    target = torch.empty_like(memory)
    return Floor(
        rows * multiplied * (evaluations + 2 * sweeps) / rate * 1e3, rows * activated * evaluations * tanh * 1e3,
        seconds(lambda: target.copy_(memory)) * 1e3,
    )  # fmt: skip


def main() -> None:
    print(header().split("\n")[0] + "\n")
    columns = "products", "activations", "both", "bytes", "kernels", "kernels / both", "solve and backward"
    print(f"| row, ms | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    spent = [0.0]
    run = CPUSolve._run

    def timed(self: CPUSolve, go_on: Callable[[], int]) -> None:
        start = time.perf_counter()
        run(self, go_on)
        spent[0] += time.perf_counter() - start

    CPUSolve._run = timed  # type: ignore[method-assign]
    for work in workloads():
        if not any(isinstance(layer, nn.Linear) for layer in work.field.modules()):
            continue
        fixed = {"step_size": work.step_size} if work.steps else {"rtol": work.rtol, "atol": work.atol}
        config = SolverConfig(method=work.method, engine="fused", **fixed)
        inside: list[float] = []

        def step(work: Workload = work, config: SolverConfig = config, inside: list[float] = inside) -> None:
            spent[0] = 0.0
            solution = solve_configured(work.field, work.y0, work.ts, config)
            loss_of(solution.ys[1:]).backward()
            inside.append(spent[0])

        whole = seconds(step)
        stats = solve_configured(work.field, work.y0, work.ts, config).stats
        least = floor(work, stats.nfe or 0, stats.nfe or 0, stats.kept_bytes or 0)
        kernels = statistics.median(inside) * 1e3
        print(
            f"| {work.name} | {least.products:.2f} | {least.activations:.2f} | {least.operations:.2f} "
            f"| {least.bytes:.2f} | {kernels:.2f} | {kernels / least.operations:.2f} | {whole * 1e3:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
