"""Batches whose order is a function of (seed, epoch), from a loader that can say and restore where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Batch = tuple[torch.Tensor, ...]
Transform = Callable[[Batch, torch.Generator], Batch]


class EpochOrder:
    """The order of the samples in each epoch, a function of the seed and the epoch alone.

    Args:
        samples: number of samples.
        batch_size: samples in a batch of one process.
        shuffle: permute the samples anew in each epoch.
        seed: of the permutations.
        rank, world_size: which process this is, of how many; each takes its share of every batch, and all take
            equally many batches.
    """

    def __init__(
        self, samples: int, batch_size: int, shuffle: bool, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.samples, self.batch_size, self.shuffle, self.seed = samples, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.samples // (self.batch_size * self.world_size))

    def batches(self, epoch: int) -> list[torch.Tensor]:
        """Index batches of `epoch` for this process."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(self.samples, generator=generator)
        else:
            order = torch.arange(self.samples)
        together = order.split(self.batch_size * self.world_size)
        if self.world_size == 1:
            return list(together)
        # the last batch may be too small for every process to get a share: fill it up from the front
        return [_filled(b, self.world_size, order)[self.rank :: self.world_size] for b in together]


class ReplayLoader:
    """An in-memory loader that can replay any batch of any epoch.

    Args:
        tensors: arrays of equal length, [N, ...]; a batch holds the same rows of each.
        order: which rows, in which order.
        shared: tensors that every batch carries whole, after the rows.
        transform: applied to each batch with a generator that depends on (seed, epoch, batch) alone.
    """

    def __init__(
        self,
        tensors: Batch,
        order: EpochOrder,
        shared: Batch = (),
        transform: Transform | None = None,
    ):
        self.tensors, self.shared, self.transform = tensors, shared, transform
        self.sampler = order  # Lightning looks for these two names, to set the epoch
        self.batch_sampler = None
        self._next = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # The position belongs to one pass; it is taken when the pass begins, since Lightning makes an iterator
        # before it says which epoch it is for.
        start, self._next = self._next, 0
        epoch = self.sampler.epoch
        for index, rows in enumerate(self.sampler.batches(epoch)):
            if index >= start:
                yield self._batch(epoch, index, rows)

    def batch(self, epoch: int, index: int) -> Batch:
        """Batch `index` of `epoch`, as the training saw it or will see it."""
        return self._batch(epoch, index, self.sampler.batches(epoch)[index])

    def _batch(self, epoch: int, index: int, rows: torch.Tensor) -> Batch:
        batch = tuple(tensor[rows] for tensor in self.tensors)
        if self.transform is not None:
            batch = self.transform(batch, torch.Generator().manual_seed(_mix(self.sampler.seed, epoch, index + 1)))
        return (*batch, *self.shared)

    def state_dict(self) -> dict[str, int]:
        """Where the next pass starts: its epoch and the index of its first batch."""
        return {"epoch": self.sampler.epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass starts at batch `state["batch"]` of epoch `state["epoch"]`."""
        self.sampler.set_epoch(state["epoch"])
        self._next = state["batch"]


def _mix(*numbers: int) -> int:
    """One seed from several numbers, different for (1, 2) and (2, 1)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (2**63)
    return mixed


def _filled(batch: torch.Tensor, multiple: int, source: torch.Tensor) -> torch.Tensor:
    missing = -len(batch) % multiple
    return torch.cat([batch, source.repeat(-(-missing // len(source)) or 1)[:missing]])
