"""The GPU tables: `python benchmarks/gpu.py [--json FILE]`. Without a GPU it says so and measures nothing.

Forward passes and training steps, with peak memory and errors, of 2-64-64-2 with 100 rk4 steps and with adaptive steps
at growing batches, of two fields that no kernel of ours knows, and forward passes of the Lorenz system, 1000 fixed
steps of many trajectories (the table that DiffEqGPU publishes). The arms take turns as in `solve.py`; a time is a
median, the device waited for. Errors are relative, against float64 at tolerances of 1e-10. No arm multiplies in TF32.

`--device cpu --largest 64` tries the same on small batches where there is no GPU; such figures say nothing of one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory for itself

import torch
from fields import ConvPair, Lorenz, NormedMLP
from measure import Answer, Arm, Workload, errors, reference, times
from peers import ARMS, BASE, Absent
from solve import header
from torch import nn

from neuralode.nn import MLPField

COMPARED = (BASE, "neuralode, stepper", "torchdiffeq", "torchode (steps per sample)", "diffrax")
BATCHES = (256, 4096, 65_536, 1_048_576)
TRAJECTORIES = (8, 512, 32_768, 1_048_576, 8_388_608)
SECONDS_PER_CELL = 20.0
MOST_WITH_ERRORS = 65_536
"""The largest batch that the reference in float64 is computed for."""


class Table(NamedTuple):
    """One field at growing batches."""

    name: str
    field: Callable[[int], nn.Module]
    """Makes it for a batch."""
    shape: tuple[int, ...]
    """Of one sample's state."""
    sizes: tuple[int, ...]
    settings: dict[str, Any]
    trains: bool = True

    def workload(self, size: int, device: str) -> Workload:
        return Workload(self.name, lambda: self.field(size), (size, *self.shape), device=device, **self.settings)


def tables() -> list[Table]:
    def small(_: int) -> nn.Module:
        return MLPField(2, [64, 64])

    tolerances = {"rtol": 1e-4, "atol": 1e-5}
    return [
        Table("2-64-64-2, 100 rk4 steps", small, (2,), BATCHES, {"method": "rk4", "steps": 100}),
        Table("2-64-64-2, dopri5 1e-4/1e-5", small, (2,), BATCHES, tolerances),
        Table("any field: 2-64-64-2 with a group norm, dopri5 1e-4/1e-5", lambda _: NormedMLP(2, 64), (2,),
              BATCHES[:3], tolerances),
        Table("any field: conv 3x3 twice, 64 channels, 8x8, dopri5 1e-4/1e-5", lambda _: ConvPair(64), (64, 8, 8),
              (128,), tolerances),
        Table("Lorenz, 1000 rk4 steps", Lorenz, (3,), TRAJECTORIES, {"method": "rk4", "steps": 1000}, trains=False),
    ]  # fmt: skip


def tried(action: Callable[[], Any]) -> tuple[Any, str]:
    """What an action gives, or why it cannot be had."""
    try:
        return action(), ""
    except Absent as reason:
        return None, str(reason)
    except Exception as error:  # a peer may fail in its own ways, and the others still count
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        said = str(error).strip().splitlines()
        full = "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error)
        return None, "out of memory" if full else f"{type(error).__name__}: {said[0][:80] if said else ''}"


def cell(table: Table, size: int, device: str) -> list[dict[str, Any]]:
    """One field at one batch; a record for each arm."""
    work = table.workload(size, device)
    records = {name: {"table": table.name, "batch": size, "arm": name} for name in COMPARED}
    exact: Answer | None = None
    if table.trains and size <= MOST_WITH_ERRORS:
        exact, _ = tried(lambda: reference(work))
    arms: dict[str, Arm] = {}
    for name, record in records.items():
        print(f"{table.name}, {size}: {name} ...", file=sys.stderr, flush=True)
        arm, why = tried(lambda name=name: ready(ARMS[name](work), table.trains))
        if arm is None:
            record["why"] = why
            continue
        arms[name] = arm
        if table.trains and exact is not None:
            answer, _ = tried(arm.answer)
            if answer is not None:
                record["loss_error"], record["gradient_error"] = errors(answer, exact)
        if table.trains:
            record["peak_bytes"], _ = tried(arm.peak)
    found = {"forward": times({name: arm.forward for name, arm in arms.items()}, 40, SECONDS_PER_CELL / 2)}
    if table.trains:
        found["training"] = times({name: arm.step for name, arm in arms.items()}, 40, SECONDS_PER_CELL / 2)
    for what, seconds in found.items():
        for name, value in seconds.items():
            records[name][what] = value * 1e3
    return list(records.values())


def ready(arm: Arm, trains: bool) -> Arm:
    """The arm, after it has run as often as anything of it is made at a first or second call."""
    for _ in range(3):
        arm.forward()
        if trains:
            arm.step()
    return arm


def print_cell(records: Sequence[dict[str, Any]]) -> None:
    ours = records[0]
    for r in records:
        if "why" in r:
            print(f"| {r['batch']} | {r['arm']} | {r['why']} | | | | | |")
            continue
        training = r.get("training")
        ratio = training / ours["training"] if training and "training" in ours else None
        numbers = [
            f"{r['forward']:.3f}",
            "–" if training is None else f"{training:.3f}",
            "–" if ratio is None else f"{ratio:.2f}",
            *(f"{r[k]:.1e}" if k in r else "–" for k in ("loss_error", "gradient_error")),
            f"{r['peak_bytes'] / 2**20:.1f}" if r.get("peak_bytes") is not None else "–",
        ]
        print(f"| {r['batch']} | {r['arm']} | {' | '.join(numbers)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The GPU tables.")
    parser.add_argument("tables", nargs="*", help="tables whose names contain one of these")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--largest", type=int, default=TRAJECTORIES[-1], help="leave larger batches out")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no GPU here, so nothing was measured.")
        return
    torch.backends.cudnn.allow_tf32 = False
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU, a trial"
    print(f"{device}; CUDA {torch.version.cuda}. {header()}")
    records: list[dict[str, Any]] = []
    for table in tables():
        if given.tables and not any(part in table.name for part in given.tables):
            continue
        print(f"\n### {table.name}\n")
        print(
            "| batch | arm | forward, ms | training step, ms | / neuralode | loss error | gradient error | peak MiB |"
        )
        print("|---:|---|---:|---:|---:|---:|---:|---:|")
        for size in (size for size in table.sizes if size <= given.largest):
            found = cell(table, size, given.device)
            print_cell(found)
            records += found
    if given.json:
        given.json.write_text(json.dumps({"device": device, "records": records}, indent=1))


if __name__ == "__main__":
    main()
