"""What is built, for which processors, and what to do about what is not."""

from __future__ import annotations

import os

import torch

from neuralode.kernels.cuda.compiler import CompileError, cache_folder, nvrtc_version
from neuralode.kernels.library import INSTRUCTION_SETS, library, load, path_of, runs_here, runtime

_REBUILD = "install the package again where there is a C++ compiler: pip install --force-reinstall --no-deps ."
_HOLDS = "ATEN_CPU_CAPABILITY"
_CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""Values of that variable that PyTorch heeds."""


def report() -> str:
    """The state of the kernels, a line each."""
    used = library()
    lines = [f"neuralode's kernels, beside PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"]
    for name in INSTRUCTION_SETS:
        lines.append(f"  CPU, {name}: {_state(name, used.name if used else '')}")
    if used and runtime().parallel:
        lines.append(f"  threads: {torch.get_num_threads()}, of PyTorch's own pool (torch.set_num_threads)")
    elif used:
        lines.append("  threads: one, for PyTorch's OpenMP runtime has no GOMP_parallel here")
    lines.append(f"  CUDA: {_cuda_state()}")
    lines.append(f"  compiled kernels are kept in {cache_folder()} ($NEURALODE_CACHE moves it)")
    if not used:
        lines.append("Solves run in the stepper, in plain PyTorch.")
    return "\n".join(lines)


def _cuda_state() -> str:
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU here"
    try:
        version = nvrtc_version()
    except CompileError as why:
        return f"not in use; {why}"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"compiled for {names} when first used, by NVRTC {version}"


def _state(name: str, used: str) -> str:
    path = path_of(name)
    if not path.exists():
        return f"not built; {_REBUILD}"
    if not runs_here(name):
        held = os.environ.get(_HOLDS, "")
        if held.upper() in _CAPABILITIES:
            return f"built, but the variable {_HOLDS}={held} holds PyTorch to other instructions; unset it to use this"
        return "built; this processor does not have the instructions"
    if load(path) is None:
        return f"built, but it does not load or was made from other sources; {_REBUILD}"
    return f"in use ({path.name})" if name == used else "built"
