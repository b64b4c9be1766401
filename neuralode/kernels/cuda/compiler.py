"""NVRTC, CUDA's compiler at run time, which comes with PyTorch's CUDA build; what it makes is kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

HEADERS = Path(__file__).parents[1] / "csrc"
_OPTIONS = ("-std=c++17", "-diag-suppress=177")


class CompileError(RuntimeError):
    """CUDA's compiler is missing or refused a kernel; the message says why."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: $NEURALODE_CACHE, or `neuralode` among the user's caches."""
    given = os.environ.get("NEURALODE_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuralode"


def compiled(source: str, architecture: str) -> bytes:
    """The binary of a source for an architecture such as "sm_90"; taken from the disk where it was made before.

    Raises:
        CompileError: if there is no compiler, or it refuses the source.
    """
    nvrtc = _nvrtc()
    headers = _headers()
    key = hashlib.sha256("\0".join([source, architecture, nvrtc_version(), *_OPTIONS, *headers.values()]).encode())
    path = cache_folder() / f"{key.hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    binary = _compile(nvrtc, source, headers, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written to is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(binary)
        os.replace(file.name, path)
    return binary


def nvrtc_version() -> str:
    """The compiler's version; CompileError if there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _compile(nvrtc: ctypes.CDLL, source: str, headers: dict[str, str], architecture: str) -> bytes:
    program = ctypes.c_void_p()
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"neuralode.cu", len(headers), texts, names)
    options = [f"-arch={architecture}".encode(), *(option.encode() for option in _OPTIONS)]
    try:
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _read(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise CompileError(f"CUDA's compiler refused a kernel: {log.strip()[:1000]}")
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


@functools.cache
def _headers() -> dict[str, str]:
    files = [*HEADERS.glob("*.h"), *(HEADERS / "cuda").glob("*.h"), *(HEADERS / "cuda").glob("*.cuh")]
    return {file.name: file.read_text() for file in sorted(files) if file.name != "shim.h"}


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """PyTorch's own, else the system's."""
    candidates = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        candidates = [*map(str, sorted(Path(folder).glob("*/lib/libnvrtc.so.*"))), *candidates]
    for name in candidates:
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL(name)
            library.nvrtcVersion  # noqa: B018 - some other file would not have it
            return library
    raise CompileError("CUDA's compiler at run time (libnvrtc) is not installed; PyTorch's CUDA build brings it.")
