"""The compiled kernels for the CPU: which are built, which this machine can run, and why not."""

from __future__ import annotations

import ctypes
import functools
import struct
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

INSTRUCTION_SETS = {"avx512": ("AVX512",), "avx2": ("AVX512", "AVX2"), "plain": ()}
"""The builds, the best first, and for each the capabilities, as PyTorch names them, of which a processor needs one."""


class Library(NamedTuple):
    """A build that is loaded."""

    name: str
    path: Path
    functions: ctypes.CDLL


def path_of(name: str) -> Path:
    """Where the build of that name lies, whether or not it is there."""
    return Path(__file__).parent / f"_cpu_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def runs_here(name: str) -> bool:
    """Whether this processor has the instructions of a build."""
    wanted = INSTRUCTION_SETS[name]
    return not wanted or torch.backends.cpu.get_cpu_capability() in wanted


@functools.cache
def library() -> Library | None:
    """The best build that runs here; None if there is none."""
    for name in INSTRUCTION_SETS:
        path = path_of(name)
        if runs_here(name) and path.exists():
            functions = load(path)
            if functions is not None:
                return Library(name, path, functions)
    return None


def why_not() -> str:
    """Why there is no library, in one sentence with the remedy."""
    built = [name for name in INSTRUCTION_SETS if path_of(name).exists()]
    if not built:
        return "no kernels are built (install the package again where there is a C++ compiler)"
    return f"the kernels built ({', '.join(built)}) do not load or are of other sources; install the package again"


@functools.cache
def version() -> int:
    """A checksum of the sources that lie here, as setup.py reckons it: a build of others is not used."""
    sources = sorted((Path(__file__).parent / "csrc").glob("*.[ch]*"))
    return functools.reduce(lambda crc, path: zlib.crc32(path.read_bytes(), crc), sources, 0)


def load(path: Path) -> ctypes.CDLL | None:
    """A build, ready to be called; None if it does not load or was made from other sources."""
    if not _whole(path):
        return None
    try:
        functions = ctypes.CDLL(str(path))
        functions.neuralode_version.restype = ctypes.c_uint
        if functions.neuralode_version() != version():
            return None
    except (OSError, AttributeError):
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_double
    functions.neuralode_begin.restype = pointer
    functions.neuralode_begin.argtypes = [pointer, ctypes.c_int]
    functions.neuralode_forward.argtypes = [pointer, number, pointer]
    functions.neuralode_backward.argtypes = [*[pointer] * 5, number, ctypes.c_int64, ctypes.c_int, pointer]
    functions.neuralode_read.argtypes = [pointer, pointer, pointer, pointer]
    functions.neuralode_end.argtypes = [pointer]
    functions.neuralode_end.restype = None
    functions.neuralode_take_stage.argtypes = [ctypes.c_int, *[pointer] * 4]
    functions.neuralode_pull_stage.argtypes = [ctypes.c_int, *[pointer] * 4]
    functions.neuralode_error_ratio.argtypes = [ctypes.c_int, *[pointer] * 3, number, number, pointer]
    functions.neuralode_error_ratio.restype = number
    functions.neuralode_judge_rows.argtypes = [ctypes.c_int, *[pointer] * 3, ctypes.c_int64, pointer, pointer]
    functions.neuralode_judge_rows.restype = ctypes.c_int64
    for name in ("take_stage", "pull_stage"):
        getattr(functions, f"neuralode_{name}").restype = None
    return functions


def _whole(path: Path) -> bool:
    """Whether a build has all its bytes, as far as its header says: the loader stops the process at a part of one."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":  # the table at the end of the file is where this format has it, in 64 bits
        return bool(header)
    if len(header) < 64:
        return False
    (table,), (size, count) = struct.unpack_from("<Q", header, 0x28), struct.unpack_from("<HH", header, 0x3A)
    return bool(path.stat().st_size >= table + size * count)


class Runtime(ctypes.Structure):
    """Entry points of the OpenMP runtime on which PyTorch runs."""

    _fields_ = [("parallel", ctypes.c_void_p), ("count", ctypes.c_void_p), ("index", ctypes.c_void_p)]


@functools.cache
def runtime() -> Runtime:
    """Found through PyTorch's own library, so that it is the very runtime; empty, for one thread, if there is none."""
    try:
        # a handle finds what the library that it stands for depends on
        torch_cpu = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        names = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num")
        return Runtime(*(ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p).value for name in names))
    except (OSError, AttributeError, StopIteration):
        return Runtime(None, None, None)
