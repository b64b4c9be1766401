"""Times, errors and memory of one training step, neuralode and its peers side by side: `python benchmarks/solve.py`.

    python benchmarks/solve.py [row substrings] [--repeats N] [--arms a,b] [--json FILE]

A training step is a forward pass, a backward pass and a step of SGD, in float32; the loss is the mean square of the
states at all output times but the first. Every arm starts from the same weights and has the same tolerances. The arms
take turns, in one process; a time is the median. Errors are relative, against torchdiffeq in float64 at tolerances of
1e-10 and 1e-12: for fixed steps too, so they hold the error of the method. Evaluations of the field are written as
forward + backward. Peers that are not installed are left out by name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from fields import ConvPair, VanDerPol
from measure import Arm, Workload, errors, reference, times
from peers import ARMS, BASE, Absent

from neuralode.nn import MLPField

PACKAGES = ("neuralode", "torch", "torchdiffeq", "torchode", "torchdyn", "jax", "diffrax")
SECONDS_PER_ROW = 60.0


def small() -> MLPField:
    return MLPField(2, [64, 64])


def workloads() -> list[Workload]:
    return [
        Workload("2-50-2, B 20, 10 times, dopri5 1e-7/1e-9", lambda: MLPField(2, [50]), (20, 2), times=10,
                 rtol=1e-7, atol=1e-9),
        Workload("2-64-64-2, B 256, dopri5 1e-3/1e-4", small, (256, 2), rtol=1e-3, atol=1e-4),
        Workload("2-64-64-2, B 256, dopri5 1e-5/1e-6", small, (256, 2), rtol=1e-5, atol=1e-6),
        Workload("2-64-64-2, B 256, 100 Euler steps", small, (256, 2), method="euler", steps=100),
        Workload("2-64-64-2, B 256, 50 rk4 steps", small, (256, 2), method="rk4", steps=50),
        Workload("20-100-100-20, B 50, 100 times, dopri5 1e-4/1e-5", lambda: MLPField(20, [100, 100]), (50, 20),
                 times=100, rtol=1e-4, atol=1e-5),
        Workload("64-256-256-64, B 1024, dopri5 1e-4/1e-5", lambda: MLPField(64, [256, 256]), (1024, 64), rtol=1e-4,
                 atol=1e-5),
        Workload("conv 3x3 twice, 64 channels, 8x8, B 128, dopri5 1e-3/1e-4", lambda: ConvPair(64), (128, 64, 8, 8),
                 rtol=1e-3, atol=1e-4),
        Workload("van der Pol, μ from 0.1 to 10, B 256, t to 5, dopri5 1e-5/1e-6", lambda: VanDerPol(256), (256, 2),
                 end=5.0, rtol=1e-5, atol=1e-6, spread=True, most_steps=512),
    ]  # fmt: skip


def made(work: Workload, chosen: list[str]) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms that can serve a workload, tried once, and for the others why not."""
    arms: dict[str, Arm] = {}
    why: dict[str, str] = {}
    for name, make in ARMS.items():
        if chosen and name != BASE and not any(part in name for part in chosen):
            continue
        print(f"{work.name}: {name} ...", file=sys.stderr, flush=True)
        try:
            arm = make(work)
            arm.step()
            arms[name] = arm
        except Absent as reason:
            why[name] = str(reason)
        except Exception as error:  # a peer may fail in its own ways, and the others still count
            why[name] = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
            )
    return arms, {name: reason for name, reason in why.items() if reason}


def row(work: Workload, chosen: list[str], repeats: int) -> list[dict[str, Any]]:
    """Measures one workload; a record for each arm."""
    arms, why = made(work, chosen)
    exact = reference(work)
    answers = {name: arm.answer() for name, arm in arms.items()}
    seconds = times({name: arm.step for name, arm in arms.items()}, repeats, SECONDS_PER_ROW)
    records: list[dict[str, Any]] = []
    for name, arm in arms.items():
        answer = answers[name]
        loss_error, gradient_error = errors(answer, exact)
        records.append({
            "row": work.name, "arm": name, "ms": seconds[name] * 1e3, "ratio": seconds[name] / seconds[BASE],
            "forward": answer.forward, "backward": answer.backward, "accepted": answer.accepted,
            "loss_error": loss_error, "gradient_error": gradient_error, "peak_bytes": arm.peak(),
        })  # fmt: skip
    return records + [{"row": work.name, "arm": name, "why": reason} for name, reason in why.items()]


def print_row(records: list[dict[str, Any]]) -> None:
    print(f"\n### {records[0]['row']}\n")
    print(f"| arm | ms | time / {BASE} | evaluations | steps | loss error | gradient error | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for r in records:
        if "why" in r:
            print(f"| {r['arm']} | {r['why']} | | | | | | |")
            continue
        calls = "–" if r["forward"] is None else f"{r['forward']} + {r['backward']}"
        print(
            f"| {r['arm']} | {r['ms']:.2f} | {r['ratio']:.2f} | {calls} | {r['accepted'] or '–'} "
            f"| {r['loss_error']:.1e} | {r['gradient_error']:.1e} | {r['peak_bytes'] / 2**20:.2f} |",
            flush=True,
        )


def memory() -> list[dict[str, Any]]:
    """Peak memory of a long solve, its graphs kept or its steps recomputed."""
    work = Workload("memory: 2-64-64-2, B 256, 100 rk4 steps", small, (256, 2), method="rk4", steps=100)
    names = (
        "neuralode", "neuralode, recomputing", "neuralode, stepper", "neuralode, stepper, recomputing",
        "neuralode, adjoint", "torchdiffeq", "torchdiffeq, adjoint",
    )  # fmt: skip
    peaks = {name: ARMS[name](work).peak() for name in names}
    print(f"\n### {work.name}\n\n| arm | peak MiB | peak / {BASE} |\n|---|---:|---:|")
    for name, peak in peaks.items():
        print(f"| {name} | {peak / 2**20:.2f} | {peak / peaks[BASE]:.3f} |", flush=True)
    return [{"row": work.name, "arm": name, "peak_bytes": peak} for name, peak in peaks.items()]


def header() -> str:
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return (
        f"{processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"{', '.join(versions)}.\n\n"
        "diffrax solves the batch as one system under jax.jit, unless it says otherwise, and its peak is XLA's plan of "
        "temporary buffers; the others' is the most that PyTorch's allocator held over what it held before the step. "
        "`steps` counts accepted ones, the most of any sample where samples have their own."
    )


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step: neuralode and its peers.")
    parser.add_argument("rows", nargs="*", help="rows whose names contain one of these; 'memory' is the memory table")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--arms", default="", help="arms whose names contain one of these, separated by commas")
    parser.add_argument("--json", type=Path, help="also write all numbers here")
    given = parser.parse_args()
    chosen = [part for part in given.arms.split(",") if part]
    print(header(), flush=True)
    records: list[dict[str, Any]] = []
    for work in workloads():
        if not given.rows or any(part in work.name for part in given.rows):
            found = row(work, chosen, given.repeats)
            print_row(found)
            records += found
    if not given.rows or "memory" in given.rows:
        records += memory()
    if given.json:
        given.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
