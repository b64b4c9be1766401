"""The loader: an order that is a function of (seed, epoch), and a position that can be saved and restored."""

from __future__ import annotations

import itertools

import pytest
import torch

from neuralode.data import EpochOrder, ReplayLoader
from neuralode.data.loader import Batch


def noise(batch: Batch, generator: torch.Generator) -> Batch:
    """A random transform."""
    x, *rest = batch
    return (x + torch.rand(x.shape, generator=generator), *rest)


def loader(seed: int = 0, transform: bool = True, samples: int = 23, size: int = 4) -> ReplayLoader:
    tensors = (torch.arange(samples, dtype=torch.float32)[:, None].expand(-1, 2), torch.arange(samples))
    order = EpochOrder(samples, size, shuffle=True, seed=seed)
    return ReplayLoader(tensors, order, shared=(torch.arange(3),), transform=noise if transform else None)


def epoch_of(made: ReplayLoader, epoch: int) -> list[Batch]:
    made.sampler.set_epoch(epoch)
    return list(made)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True)
    )


def labels(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch[1]]


def test_every_sample_once_in_each_epoch() -> None:
    made = loader()
    assert len(made) == 6
    for epoch in range(3):
        batches = epoch_of(made, epoch)
        assert [len(batch[0]) for batch in batches] == [4, 4, 4, 4, 4, 3]
        assert sorted(labels(batches)) == list(range(23))


def test_rows_stay_together() -> None:
    for x, y, shared in epoch_of(loader(transform=False), 1):
        assert torch.equal(x[:, 0].long(), y)
        assert torch.equal(shared, torch.arange(3))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = {key: epoch_of(loader(key[0]), key[1]) for key in itertools.product((0, 1, 2), (0, 1, 2))}
    for seed, epoch in first:
        assert same(first[seed, epoch], epoch_of(loader(seed), epoch))
    orders = {tuple(labels(batches)) for batches in first.values()}
    assert len(orders) == 9, "another seed or epoch is another order"


def test_order_does_not_depend_on_what_was_drawn_before() -> None:
    made, random = loader(), torch.get_rng_state()
    wanted = epoch_of(loader(), 2)
    for epoch in (0, 1):
        epoch_of(made, epoch)
    torch.manual_seed(123)
    assert same(epoch_of(made, 2), wanted)
    torch.set_rng_state(random)
    epoch_of(made, 3)
    assert torch.equal(torch.get_rng_state(), random), "the global generator is left alone"


def test_without_shuffling_the_order_is_that_of_the_data() -> None:
    order = EpochOrder(7, 3, shuffle=False, seed=5)
    assert [b.tolist() for b in order.batches(4)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("transform", [False, True])
def test_any_batch_can_be_asked_for(transform: bool) -> None:
    made = loader(transform=transform)
    for epoch in (3, 0):
        batches = epoch_of(made, epoch)
        made.sampler.set_epoch(9)  # what is asked for, not where the training is, decides
        assert same([made.batch(epoch, i) for i in range(len(made))], batches)


def test_transform_differs_between_batches_and_epochs() -> None:
    made = loader()
    added = [made.batch(e, i)[0][:, 1] - made.batch(e, i)[1] for e in range(2) for i in range(3)]
    for one, other in itertools.combinations(added, 2):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize("batch", [0, 1, 5, 6])
def test_remaining_batches_are_replayed(batch: int) -> None:
    wanted = epoch_of(loader(), 3)
    resumed = loader()
    resumed.load_state_dict({"epoch": 3, "batch": batch})
    assert resumed.state_dict() == {"epoch": 3, "batch": batch}
    assert same(list(resumed), wanted[batch:])


def test_epoch_after_a_resumed_one_is_whole() -> None:
    resumed = loader()
    resumed.load_state_dict({"epoch": 3, "batch": 4})
    assert len(list(resumed)) == 2
    assert resumed.state_dict()["batch"] == 0
    assert same(epoch_of(resumed, 4), epoch_of(loader(), 4))


def test_position_belongs_to_the_pass_that_begins() -> None:
    made = loader()
    made.load_state_dict({"epoch": 2, "batch": 5})
    begun = iter(made)
    next(begun)
    made.sampler.set_epoch(0)
    assert same(list(made), epoch_of(loader(), 0)), "a second pass starts at its first batch"
    assert list(begun) == [], "and leaves the first as it was"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("samples", "size", "world"), [(24, 2, 3), (23, 2, 3), (25, 4, 2), (7, 2, 3), (2, 1, 5)])
def test_ranks_share_each_batch(samples: int, size: int, world: int, shuffle: bool) -> None:
    whole = EpochOrder(samples, size * world, shuffle, seed=1).batches(2)
    ranks = [EpochOrder(samples, size, shuffle, 1, rank, world) for rank in range(world)]
    parts = [order.batches(2) for order in ranks]
    assert {len(part) for part in parts} == {len(order) for order in ranks} == {len(whole)}
    for index, batch in enumerate(whole):
        shares = [part[index].tolist() for part in parts]
        assert len({len(share) for share in shares}) == 1, "every process takes equally many"
        together = sorted(i for share in shares for i in share)
        extra = list(together)
        for i in batch.tolist():
            extra.remove(i)
        assert len(extra) == -len(batch) % world, "no sample twice but those that fill the last batch up"
