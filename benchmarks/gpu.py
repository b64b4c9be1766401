"""The GPU tables: `python benchmarks/gpu.py [--json FILE]`. Without a GPU it says so and measures nothing.

Forward solves and training steps of 2-64-64-2 with 100 rk4 steps at growing batches, with peak memory; adaptive steps
of the same; the Lorenz system, 1000 fixed steps of many trajectories (the table that DiffEqGPU publishes); and a
convolutional field, which no kernel knows. Times are medians after a warm-up, with the device waited for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from measure import ConvPair
from torch import nn

import neuralode
from neuralode.nn import MLPField

BATCHES = (256, 4096, 65_536, 1_048_576)
TRAJECTORIES = (8, 512, 32_768, 1_048_576, 8_388_608)
SECONDS_PER_CELL = 10.0

Solve = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Lorenz(nn.Module):
    """σ = 10, β = 8/3 and a ρ for each trajectory; [B, 3]."""

    def __init__(self, trajectories: int):
        super().__init__()
        self.rho = nn.Parameter(torch.linspace(0, 21, trajectories))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = y.unbind(-1)
        return torch.stack([10.0 * (b - a), a * (self.rho - c) - b, a * b - 8 / 3 * c], dim=-1)


def arms(method: str, steps: int | None) -> dict[str, Solve]:
    """Ours and torchdiffeq at the same steps or tolerances, over [0, 1]; the final states."""
    ours: dict[str, Any] = {"step_size": 1 / steps} if steps else {"rtol": 1e-4, "atol": 1e-5}
    options: dict[str, Any] = {"options": {"step_size": 1 / steps}} if steps else ours

    def make(engine: str) -> Solve:
        return lambda field, y0: neuralode.solve(field, y0, [0.0, 1.0], method=method, engine=engine, **ours).ys[-1]

    def theirs(field: nn.Module, y0: torch.Tensor) -> torch.Tensor:
        ys: torch.Tensor = torchdiffeq.odeint(
            field, y0, torch.tensor([0.0, 1.0], device=y0.device), method=method, **options
        )
        return ys[-1]

    return {"neuralode": make("auto"), "neuralode, stepper": make("stepper"), "torchdiffeq": theirs}


def measure(run: Callable[[], object]) -> tuple[float, int]:
    """(median seconds, peak bytes) of a run."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    held, found = torch.cuda.memory_allocated(), []
    for _ in range(max(1, min(20, int(SECONDS_PER_CELL / max(once, 1e-4))))):
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found), torch.cuda.max_memory_allocated() - held


def table(name: str, make: Callable[[int], nn.Module], shape: tuple[int, ...], sizes: tuple[int, ...], method: str,
          steps: int | None, trains: bool) -> list[dict[str, Any]]:  # fmt: skip
    """Forward passes, and training steps if asked for, of every arm at every size."""
    print(f"\n### {name}\n\n| batch | arm | forward, ms | training step, ms | peak MiB | difference from ours |")
    print("|---:|---|---:|---:|---:|---:|")
    records = []
    for size in sizes:
        torch.manual_seed(0)
        field, y0 = make(size).cuda(), torch.randn(size, *shape, device="cuda")
        exact: torch.Tensor | None = None
        for arm, solve in arms(method, steps).items():
            record: dict[str, Any] = {"table": name, "batch": size, "arm": arm}
            try:
                with torch.no_grad():
                    final = solve(field, y0)
                    exact = final if exact is None else exact
                    record["difference"] = float((final - exact).abs().max())
                    record["forward"], _ = measure(lambda solve=solve, field=field, y0=y0: solve(field, y0))

                def step(solve: Solve = solve, field: nn.Module = field, y0: torch.Tensor = y0) -> None:
                    field.zero_grad()
                    solve(field, y0).square().mean().backward()

                if trains:
                    record["training"], record["peak"] = measure(step)
            except torch.cuda.OutOfMemoryError:
                record["failed"] = "out of memory"
                torch.cuda.empty_cache()
            records.append(record)
            forward, training = (f"{record[k] * 1e3:.3f}" if k in record else "–" for k in ("forward", "training"))
            peak = f"{record['peak'] / 2**20:.1f}" if "peak" in record else record.get("failed", "–")
            apart = f"{record['difference']:.1e}" if "difference" in record else "–"
            print(f"| {size} | {arm} | {forward} | {training} | {peak} | {apart} |", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description="The GPU tables.")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch sees no GPU here, so nothing was measured.")
        return
    device = torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, CUDA {torch.version.cuda}.")

    def small(_: int) -> nn.Module:
        return MLPField(2, [64, 64])

    records = [
        *table("2-64-64-2, 100 rk4 steps", small, (2,), BATCHES, "rk4", 100, True),
        *table("2-64-64-2, dopri5 1e-4/1e-5", small, (2,), BATCHES, "dopri5", None, True),
        *table("Lorenz, 1000 rk4 steps", Lorenz, (3,), TRAJECTORIES, "rk4", 1000, False),
        *table("conv 3x3 twice, 64 channels, 8x8, dopri5 1e-4/1e-5", lambda _: ConvPair(64), (64, 8, 8), (128,),
               "dopri5", None, True),
    ]  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps({"device": device, "records": records}, indent=1))


if __name__ == "__main__":
    main()
