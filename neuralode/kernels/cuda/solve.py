"""Whole solves by the kernels for CUDA: their memory, which PyTorch allots, and their launches."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from neuralode.kernels.cuda.source import Layout, Variant, layout_of, write_source
from neuralode.kernels.task import FULL, Int, Limits, Long, Pointer, Report, Task

_FIRST_ROOM = 64
"""Steps for which there is room at first, where a solve chooses them; it is doubled as often as needed."""


class Problem(ctypes.Structure):
    """As csrc/cuda/step.cuh has it."""

    _fields_ = [
        *((name, Long) for name in ("rows", "steps", "tiles")), ("times", Int), ("times_per_sample", Int),
        *((name, Pointer) for name in (
            "tensors", "own_rows", "y0", "slope", "ys", "ts", "grid", "stages", "end_state", "step_t", "step_h",
            "until", "step_count", "parts", "workspace", "overflow", "tickets", "status", "counts", "cotangents",
            "grad_y0", "grad_rows", "grad_tensors", "grad_times")),
        ("limits", Limits),
    ]  # fmt: skip


class Kernel(Protocol):
    """A compiled kernel."""

    def blocks(self, wanted: int, shared_bytes: int, together: bool) -> int:
        """How many blocks to launch, at most those wanted; `together` if they have to run at the same time."""
        ...

    def launch(self, blocks: int, shared_bytes: int, problem: ctypes.Structure, together: bool) -> None: ...


class Machine(Protocol):
    """What compiles kernels and runs them: a GPU, or the shim that plays one."""

    def shared_limit(self, device: torch.device) -> int:
        """Bytes that the threads of a block may share."""
        ...

    def kernel(self, source: str, name: str, threads: int, device: torch.device) -> Kernel: ...


class CUDASolve(ctypes.Structure):
    """One solve, and what is kept for its backward passes; the twin of CPUSolve.

    It is a Structure so that a tensor may own it: a graph that lets its saved tensors go lets this go too.
    """

    _fields_ = [("unused", ctypes.c_char)]

    def __init__(self, machine: Machine, task: Task):
        super().__init__()
        self.machine, self.task = machine, task
        rows, width = task.y0.shape
        self.ys = task.y0.new_empty(task.ts.shape[-1], rows, width)
        self.job = job = task.job
        steps = "GIVEN" if task.grid is not None else "OWN" if job.per_sample else "SHARED"
        wants = job.wants_gradient or (False,) * len(task.tensors)
        self.variant = Variant(job.program, wants, job.method, steps, job.groups, task.y0.dtype, self._keeps(steps),
                               machine.shared_limit(task.y0.device), job.times_move)  # fmt: skip
        self.layout: Layout = layout_of(self.variant)
        self.report = Report()
        self._kept: dict[str, torch.Tensor] = {}
        self._problem = Problem()

    def _keeps(self, steps: str) -> bool:
        """Whether the states of all stages fit into the budget."""
        count = len(self.task.grid or ()) or _FIRST_ROOM
        size = count * len(self.job.method.c) * self.task.y0.numel() * self.task.y0.element_size()
        return size <= self.job.budget

    def forward(self) -> Report:
        """Solves; the states are in `ys`, [T, B, D]."""
        task, p = self.task, self._problem
        rows, width = task.y0.shape
        layout = self.layout
        p.rows, p.tiles = rows, -(-rows // layout.rows_of_block)
        p.times, p.times_per_sample = task.ts.shape[-1], task.ts.dim() == 2
        p.limits = Limits(*vars(self.job.limits).values())
        tensors = [x.detach() for x in task.tensors]
        device = task.y0.device
        self._give(y0=task.y0, ys=self.ys, ts=task.ts.to(device), tensors=layout.pack(tensors, task.y0),
                   own_rows=layout.pack_rows(tensors, task.y0))  # fmt: skip
        if task.slope is not None:
            self._give(slope=task.slope)
        shared = self.variant.steps == "SHARED"
        if shared:
            slopes = len(self.job.method.c) + (0 if self.job.method.fsal else 1)
            parts = 2 * p.tiles * (max(self.job.groups) + 1)
            self._give(parts=torch.zeros(parts, dtype=torch.double, device=device),
                       workspace=task.y0.new_empty(p.tiles * (2 + slopes) * width * layout.rows_of_block))  # fmt: skip
        room = len(task.grid) - 1 if task.grid is not None else _FIRST_ROOM
        if task.grid is not None:
            self._give(grid=torch.tensor(task.grid, dtype=torch.double, device=device))
        while self._attempt(room, shared) == FULL:
            room *= 2
        return self.report

    def _attempt(self, room: int, shared: bool) -> int:
        """Solves with room for so many steps; the status."""
        task, p = self.task, self._problem
        rows, width = task.y0.shape
        device, variant = task.y0.device, self.variant
        p.steps = room
        if self.job.records:
            stages = (len(self.job.method.c) - self.job.method.fsal) if variant.keep_stages else 1
            each = rows if variant.steps == "OWN" else 1
            self._give(
                stages=task.y0.new_empty(room * stages * rows * width), end_state=task.y0.new_empty(rows * width),
                step_t=torch.zeros(room * each, dtype=torch.double, device=device),
                step_h=torch.zeros(room * each, dtype=torch.double, device=device),
                until=torch.ones(room * each, dtype=torch.int32, device=device),
                step_count=torch.zeros(each, dtype=torch.int32, device=device),
            )  # fmt: skip
        self._give(
            status=torch.zeros(1, dtype=torch.int32, device=device),
            counts=torch.zeros(3, rows, dtype=torch.int32, device=device),
            tickets=torch.zeros(1, dtype=torch.int32, device=device),
        )
        self._launch("neuralode_forward", False, shared)
        # the one time that the host waits for the device
        found = torch.cat([self._kept["status"].long(), self._kept["counts"].amax(1).long()]).tolist()
        report = self.report
        report.status, report.accepted, report.rejected, report.evaluations = found
        report.steps = report.accepted if shared else 0
        names = ("stages", "end_state", "step_t", "step_h", "until")
        report.kept_bytes = sum(self._kept[name].nbytes for name in names if name in self._kept)
        return report.status

    def backward(self, grad_ys: torch.Tensor, wants_y0: bool) -> tuple[torch.Tensor | None, list[torch.Tensor | None],
                                                                      torch.Tensor | None]:  # fmt: skip
        """The gradients of the state [B, D], of the tensors, and of the times in double precision."""
        task, layout = self.task, self.layout
        rows = len(task.y0)
        grad_y0 = torch.empty_like(task.y0)
        grad_rows = task.y0.new_zeros(rows, max(1, layout.row_features))
        self._give(cotangents=grad_ys.contiguous(), grad_y0=grad_y0, grad_rows=grad_rows)
        if self.job.times_move:
            parts = layout.warps if layout.tiled else 1
            self._give(grad_times=torch.zeros(
                parts, rows, task.ts.shape[-1], dtype=torch.double, device=task.y0.device))  # fmt: skip
        self._launch("neuralode_backward", True, False)
        sums = self._kept["grad_tensors"].double().sum(0).to(task.y0.dtype)
        found: list[torch.Tensor | None] = []
        for i, x in enumerate(task.tensors):
            if not self.variant.wants_gradient or not self.variant.wants_gradient[i]:
                found.append(None)
            elif i in layout.rows:
                found.append(grad_rows[:, layout.rows[i] : layout.rows[i] + layout.size(i)].reshape(x.shape))
            else:
                found.append(sums[layout.sums[i] : layout.sums[i] + layout.size(i)].reshape(x.shape))
        stages = len(self.job.method.c) - self.job.method.fsal
        self.report.products = self.report.accepted * stages
        return (grad_y0 if wants_y0 else None), found, self._grad_times()

    def _grad_times(self) -> torch.Tensor | None:
        """From the threads' shares to the gradient of the times, as the task has them."""
        if not self.job.times_move:
            return None
        shares = self._kept["grad_times"].sum(0)
        return (shares if self.task.ts.dim() == 2 else shares.sum(0)).to(self.task.ts.device)

    def take_states(self) -> torch.Tensor:
        """The states [T, B, D], handed over: a graph that owns this solve must not be owned by it through them."""
        ys = self.ys
        del self.ys, self._kept["ys"]
        return ys

    def sizes(self) -> list[float]:
        """Sizes of the accepted steps that the samples share; known where a backward pass may come."""
        kept = self._kept.get("step_h")
        return [] if kept is None else kept[: self.report.steps].abs().tolist()

    def counts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Accepted and tried steps of each sample, [B]."""
        accepted, rejected, _ = self._kept["counts"].long().cpu()
        return accepted, accepted + rejected

    def _give(self, **given: torch.Tensor) -> None:
        """Hands memory to the kernels, and keeps it."""
        self._kept |= given
        for name, x in given.items():
            setattr(self._problem, name, x.data_ptr())

    def _launch(self, name: str, backward: bool, together: bool) -> None:
        layout = self.layout
        source = write_source(self.variant, backward)
        kernel = self.machine.kernel(source, name, layout.threads, self.task.y0.device)
        memory = layout.memory(backward)
        blocks = kernel.blocks(self._problem.tiles, memory.shared, together)
        self._give(overflow=self.task.y0.new_empty(max(1, blocks * memory.overflow // self.task.y0.element_size())))
        if backward:
            self._give(grad_tensors=self.task.y0.new_zeros(blocks, max(1, layout.sum_count)))
        kernel.launch(blocks, memory.shared, self._problem, together)
