"""`python -m tests.kernels.spills`: compiles kernels with nvcc for several GPUs, and fails if registers spill.

A spilled register goes to memory and back in the hot loop. Needs CUDA's toolkit, but no GPU.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from neuralode.kernels.cuda.compiler import HEADERS
from neuralode.kernels.cuda.source import STEPS, Variant, write_source
from neuralode.kernels.cuda.stages import write_stages
from neuralode.kernels.lower import lower
from neuralode.ode.fused_engine import method_data
from neuralode.ode.tableaus import DOPRI5

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
_SHARED_LIMITS = {"mlp 2-64-64-2": 163 * 1024, "mlp 64-256-256-64": 163 * 1024, "lorenz": 99 * 1024}


class Found(NamedTuple):
    """What the compiler says of a kernel on a GPU."""

    kernel: str
    architecture: str
    registers: int
    spilled: int
    """Bytes of registers stored to memory."""


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, width)
    )  # fmt: skip


class _Lorenz(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([10.0, 28.0, 8 / 3]))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        sigma, rho, beta = self.coefficients.unbind()
        x, y, z = y.unbind(-1)
        return torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], dim=-1)


def _variants() -> Iterator[tuple[str, Variant]]:
    fields: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "mlp 2-64-64-2": (functools.partial(_mlp, 2, 64), 2),
        "mlp 64-256-256-64": (functools.partial(_mlp, 64, 256), 64),
        "lorenz": (_Lorenz, 3),
    }
    for name, (make, width) in fields.items():
        module = make()
        lowered = lower(lambda t, y, module=module: module(y), torch.tensor(0.0), torch.ones(5, width), ())
        for steps, times_move in [*((steps, False) for steps in STEPS), ("SHARED", True)]:
            yield f"{name}, steps {steps.lower()}{', moving times' if times_move else ''}", Variant(
                lowered.program, (True,) * len(lowered.tensors), method_data(DOPRI5), steps, (0,) * width,
                torch.float32, True, _SHARED_LIMITS[name], times_move,
            )  # fmt: skip


def report() -> list[Found]:
    """Compiles every kernel for every architecture.

    Raises:
        RuntimeError: if nvcc refuses one.
    """
    tasks = [(f"{name}, {'backward' if back else 'forward'}", write_source(variant, back))
             for name, variant in _variants() for back in (False, True)]  # fmt: skip
    tasks += [(f"operations of a step, {dtype}", write_stages(method_data(DOPRI5), dtype))
              for dtype in (torch.float32, torch.float64)]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        return [found for one in pool.map(lambda task: _compile(*task), tasks) for found in one]


def _compile(name: str, source: str) -> list[Found]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        targets = [f"-gencode=arch={a.replace('sm_', 'compute_')},code={a}" for a in ARCHITECTURES]
        done = subprocess.run(
            ["nvcc", "-fatbin", *targets, "-std=c++17", "-diag-suppress=177", "-Xptxas=-v", f"-I{HEADERS}",
             f"-I{HEADERS / 'cuda'}", str(path), "-o", str(path.with_suffix(".fatbin"))],
            capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"nvcc refused the kernel of {name}: {done.stderr[:2000]}")
    found = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        architecture = re.search(r"for '(sm_\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", part))
        assert architecture is not None
        assert registers is not None
        found.append(Found(name, architecture[1], int(registers[1]), spilled))
    return found


def main() -> int:
    if shutil.which("nvcc") is None:
        print("nvcc is not installed, so that the kernels for CUDA were not compiled for a GPU.")
        return 0
    found = report()
    print(f"{'kernel':44} {'GPU':8} registers  bytes spilled")
    for one in found:
        print(f"{one.kernel:44} {one.architecture:8} {one.registers:9}  {one.spilled:13}")
    spilled = [one for one in found if one.spilled]
    if spilled:
        print(f"{len(spilled)} kernels spill registers.")
    return bool(spilled)


if __name__ == "__main__":
    sys.exit(main())
