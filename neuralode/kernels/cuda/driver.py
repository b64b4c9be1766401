"""NVIDIA's driver: loads compiled kernels and launches them on PyTorch's current stream."""

from __future__ import annotations

import ctypes
import functools

import torch

from neuralode.kernels.cuda.compiler import compiled

_MOST_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"""
_MULTIPROCESSORS, _SHARED_LIMIT = 16, 97
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"""

_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: it does not wait for the default stream."""


class DriverError(RuntimeError):
    """The driver refused; the message has its own name for why."""


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has, as one of PyTorch's own may be; it is never destroyed."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes PyTorch's context the current one
        _check(_driver().cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING))
    assert handle.value is not None
    return torch.cuda.ExternalStream(handle.value, device)


class GPU:
    """The machine that PyTorch's CUDA tensors are on."""

    def shared_limit(self, device: torch.device) -> int:
        return _attribute(_SHARED_LIMIT, _index(device))

    def kernel(self, source: str, name: str, threads: int, device: torch.device) -> _GPUKernel:
        return _kernel(source, name, threads, _index(device))


class _GPUKernel:
    def __init__(self, function: ctypes.c_void_p, threads: int, device: int):
        self.function, self.threads, self.device = function, threads, device
        self._allowed = 0
        self._resident: dict[int, int] = {}

    def blocks(self, wanted: int, shared_bytes: int, together: bool) -> int:
        """As many as the device holds at a time: a block goes on with the next tile of rows."""
        self._allow(shared_bytes)
        if shared_bytes not in self._resident:
            count = ctypes.c_int()
            _check(_driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(count), self.function, self.threads, ctypes.c_size_t(shared_bytes)))  # fmt: skip
            self._resident[shared_bytes] = max(1, count.value) * _attribute(_MULTIPROCESSORS, self.device)
        return min(wanted, self._resident[shared_bytes])

    def launch(self, blocks: int, shared_bytes: int, problem: ctypes.Structure, together: bool) -> None:
        self._allow(shared_bytes)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(problem))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        shape = (blocks, 1, 1, self.threads, 1, 1, shared_bytes, stream, arguments)
        driver = _driver()
        with torch.cuda.device(self.device):
            if together:
                _check(driver.cuLaunchCooperativeKernel(self.function, *shape))
            else:
                _check(driver.cuLaunchKernel(self.function, *shape, None))

    def _allow(self, shared_bytes: int) -> None:
        if shared_bytes > self._allowed:
            _check(_driver().cuFuncSetAttribute(self.function, _MOST_SHARED_BYTES, shared_bytes))
            self._allowed = shared_bytes


@functools.lru_cache(maxsize=512)
def _kernel(source: str, name: str, threads: int, device: int) -> _GPUKernel:
    major, minor = torch.cuda.get_device_capability(device)
    binary = compiled(source, f"sm_{major}{minor}{'a' if major == 9 else ''}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes PyTorch's context the current one
        _check(_driver().cuModuleLoadData(ctypes.byref(module), binary))
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
    return _GPUKernel(function, threads, device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _attribute(number: int, device: int) -> int:
    value, handle = ctypes.c_int(), ctypes.c_int()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device))
    _check(_driver().cuDeviceGetAttribute(ctypes.byref(value), number, handle))
    return value.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise DriverError(f"CUDA's driver refused: {(name.value or b'unknown').decode()}.")
