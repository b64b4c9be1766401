"""The kernels for CUDA on the CPU, for tests: g++ compiles their source, and a shim plays the GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import subprocess
import tempfile
from pathlib import Path

import torch

HEADERS = Path(__file__).parents[1] / "csrc"
_MAIN = """
extern "C" void run(const void* problem, int blocks, int threads, int shared, int backwards) {{
    using namespace neuralode;
    shim::launch(blocks, threads, shared, [](const void* p) {{ {name}(*(const Problem*)p); }}, problem, backwards);
}}
"""


class Shim:
    """A machine of so many blocks at a time, whose threads take turns from the first to the last, or backwards."""

    def __init__(self, most_blocks: int = 3, backwards: bool = False, shared: int = 99 * 1024):
        self.most_blocks, self.backwards, self.shared = most_blocks, backwards, shared

    def shared_limit(self, device: torch.device) -> int:
        return self.shared

    def kernel(self, source: str, name: str, threads: int, device: torch.device) -> _ShimKernel:
        return _ShimKernel(_compiled(source, name), threads, self)


class _ShimKernel:
    def __init__(self, library: ctypes.CDLL, threads: int, shim: Shim):
        self.library, self.threads, self.shim = library, threads, shim

    def blocks(self, wanted: int, shared_bytes: int, together: bool) -> int:
        return min(wanted, self.shim.most_blocks)

    def launch(self, blocks: int, shared_bytes: int, problem: ctypes.Structure, together: bool) -> None:
        self.library.run(ctypes.byref(problem), blocks, self.threads, shared_bytes, self.shim.backwards)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="neuralode-shim-")


@functools.cache
def _compiled(source: str, name: str) -> ctypes.CDLL:
    stem = Path(_folder().name) / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    stem.with_suffix(".cpp").write_text(source + _MAIN.format(name=name))
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-DNEURALODE_SHIM", f"-I{HEADERS}",
               f"-I{HEADERS / 'cuda'}", str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the kernel {name} does not compile under g++: {done.stderr[:2000]}")
    return ctypes.CDLL(str(stem.with_suffix(".so")))
