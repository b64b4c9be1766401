"""Records what a function does on a GPU as a CUDA graph; a function that cannot be recorded leaves nothing behind."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch

from neuralode.kernels.cuda.driver import new_stream

_free: dict[torch.device, list[torch.cuda.Stream]] = {}
"""Streams of recorders that are gone."""


class Recorder:
    """Records functions that never run at the same time, and so share their memory.

    What it returns does again what the function did when it was recorded; on a CPU that is the function itself. Nobody
    else records on its stream: libraries keep memory of their own for each stream, which PyTorch takes from a graph,
    and takes away again as any graph of that stream goes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            free = _free.setdefault(device, [])
            self.stream = free.pop() if free else new_stream(device)
            self.pool = torch.cuda.graph_pool_handle()
            weakref.finalize(self, free.append, self.stream)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Runs the function twice, then records it.

        Raises:
            RuntimeError: if it does what cannot be recorded.
        """
        if self.device.type != "cuda":
            return function
        with torch.cuda.device(self.device):
            self._rehearse(function)
            return self._record(function)

    def _rehearse(self, function: Callable[[], None]) -> None:
        """Libraries set themselves up at their first call; the second has to do without waiting for the device."""
        now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(now)
        try:
            with torch.cuda.stream(aside):
                function()
                mode = torch.cuda.get_sync_debug_mode()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    function()
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
        finally:
            now.wait_stream(aside)

    def _record(self, function: Callable[[], None]) -> Callable[[], None]:
        index, graph, ended = torch.cuda.current_device(), torch.cuda.CUDAGraph(), False
        generator = torch.cuda.default_generators[index]
        state = generator.graphsafe_get_state()
        torch.cuda.synchronize()
        generator.graphsafe_set_state(generator.clone_state())  # a recording that fails spoils the copy only
        try:
            with torch.cuda.stream(self.stream):
                # other threads, such as those that pin batches, may allocate meanwhile
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    function()
                finally:
                    graph.capture_end()
                    ended = True
        finally:
            generator.graphsafe_set_state(state)
            if not ended:
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(index, self.pool)
        return graph.replay
