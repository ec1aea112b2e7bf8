"""Batches for each rank: those of a plain ``DataLoader``, in turn, each sample once, also after a resume."""

import json
import random
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_ranks import starter
from hypothesis import given
from hypothesis import strategies as st
from rank_programs import batches_of_a_loader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    get_worker_info,
)

from gemini.booster.dataloader import RankDataLoader, prepare_dataloader
from gemini.booster.rank_sampler import RankSampler

LIST: Any = list(range(26))


def loader(rank: int = 0, world_size: int = 1, dataset: Any = LIST, batch: int = 3, **options: Any) -> Any:
    options = {"shuffle": True, "seed": 3, **options}
    return prepare_dataloader(dataset, batch, rank=rank, world_size=world_size, **options)


def loaders(world_size: int, **options: Any) -> list[Any]:
    return [loader(rank, world_size, **options) for rank in range(world_size)]


def batches(of: Any) -> list[list[int]]:
    return [batch.tolist() for batch in of]


def samples(of: Any) -> list[int]:
    return list(chain.from_iterable(batches(of)))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_rank_gets_the_batches_of_a_plain_loader_in_every_epoch(shuffle: bool, drop_last: bool) -> None:
    plain: DataLoader[Any] = DataLoader(
        LIST, 3, shuffle=shuffle, drop_last=drop_last, generator=torch.Generator().manual_seed(3)
    )
    ours = loader(shuffle=shuffle, drop_last=drop_last)
    epochs = [batches(plain) for _ in range(3)]
    assert [batches(ours) for _ in range(3)] == epochs
    assert len(ours) == len(plain)
    assert (epochs[0] != epochs[1]) == shuffle


def test_the_ranks_take_the_batches_of_one_rank_in_turn() -> None:
    whole = batches(loader(batch=2))[:12]  # what is left is too little for a batch on each of four ranks
    for world_size in (2, 4):
        of_ranks = [batches(ours)[: 12 // world_size] for ours in loaders(world_size, batch=2)]
        assert list(chain.from_iterable(zip(*of_ranks, strict=True))) == whole


@given(
    length=st.integers(0, 40),
    world_size=st.integers(1, 5),
    batch=st.integers(1, 6),
    drop_last=st.booleans(),
    epochs=st.integers(1, 2),
)
def test_each_sample_comes_once_in_an_epoch(
    length: int, world_size: int, batch: int, drop_last: bool, epochs: int
) -> None:
    dataset = list(range(length))
    of_ranks = loaders(world_size, dataset=dataset, batch=batch, drop_last=drop_last)
    for _ in range(epochs):
        lengths = [len(ours) for ours in of_ranks]
        given = [samples(ours) for ours in of_ranks]
        together = list(chain.from_iterable(given))
        assert len({len(of_rank) for of_rank in given}) == 1
        assert lengths == [-(-len(of_rank) // batch) for of_rank in given]
        if drop_last:
            assert len(together) == len(set(together)) == length // (batch * world_size) * batch * world_size
        else:
            # As torch pads: to a multiple of the number of ranks.
            assert len(together) == -(-length // world_size) * world_size
            assert set(together) == set(dataset)
        theirs = DistributedSampler(dataset, world_size, 0, drop_last=drop_last)
        assert len(RankSampler(dataset, world_size, 0, drop_last=drop_last, batch_size=batch)) == len(theirs)


def test_an_epoch_has_its_order_however_it_is_reached() -> None:
    epochs = [samples(ours) for ours in [loader()] for _ in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for wanted in (2, 0, 3, 3):
        ours = loader()
        ours.sampler.set_epoch(wanted)
        assert samples(ours) == epochs[wanted]
    for wanted in (2, 2, 0, 1):
        ours.sampler.set_epoch(wanted)
        assert samples(ours) == epochs[wanted]
    assert samples(ours) == epochs[2]


def test_an_epoch_named_before_the_last_batch_is_the_next_one() -> None:
    ours = loader()
    epochs = [samples(ours) for _ in range(3)]
    ours.sampler.set_epoch(0)
    for _ in ours:
        ours.sampler.set_epoch(2)
    assert samples(ours) == epochs[2]


def test_an_epoch_that_was_left_early_is_over() -> None:
    whole, left = loader(), loader()
    for _ in left:
        break
    samples(whole)
    assert samples(left) == samples(whole)


def test_the_seed_reaches_the_order() -> None:
    assert samples(loader(0, 2, seed=1)) == samples(loader(0, 2, seed=1)) != samples(loader(0, 2, seed=2))


# -- resuming


@given(
    length=st.integers(1, 40),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    batch_before=st.integers(1, 4),
    batch_after=st.integers(1, 4),
    steps=st.integers(0, 20),
)
def test_a_resume_gives_what_was_not_given_before_with_any_number_of_ranks(
    length: int, before: int, after: int, batch_before: int, batch_after: int, steps: int
) -> None:
    dataset = list(range(length))
    given: list[int] = []
    states = []
    for ours in loaders(before, dataset=dataset, batch=batch_before):
        iterator = iter(ours)
        for _ in range(min(steps, len(ours))):
            given += next(iterator).tolist()
        states.append(ours.state_dict())
    assert states == states[:1] * before
    resumed = loaders(after, dataset=dataset, batch=batch_after)
    for ours in resumed:
        ours.load_state_dict(json.loads(json.dumps(states[0])))
        ours.sampler.set_epoch(0)  # as training loops do
    left = len(resumed[0])
    rest = [batches(ours) for ours in resumed]
    assert [len(of_rank) for of_rank in rest] == [left] * after
    for of_rank in rest:
        given += chain.from_iterable(of_rank)
    assert set(given) == set(dataset)
    assert len(given) < length + before + after  # what was repeated, so that the ranks have the same number
    assert {len(samples(ours)) for ours in resumed} == {-(-length // after)}  # the next epoch is whole


def test_the_resumed_rank_goes_on_with_the_batches_that_it_would_have_had() -> None:
    for workers in (0, 1):
        straight, stopped, resumed = (loader(1, 2, batch=2, num_workers=workers) for _ in range(3))
        expected = batches(straight)[4:] + batches(straight)
        iterator = iter(stopped)
        for _ in range(4):  # workers have read further ahead
            next(iterator)
        resumed.load_state_dict(stopped.state_dict())
        assert batches(resumed) + batches(resumed) == expected
        del iterator


def test_a_state_is_of_the_epoch_that_comes_next_where_one_is_over() -> None:
    ours, resumed = loader(), loader()
    samples(ours)
    state = ours.state_dict()
    assert (state["epoch"], state["taken"]) == (1, 0)
    resumed.load_state_dict(state)
    assert samples(resumed) == samples(ours)


def test_a_resumed_loader_that_is_sent_to_another_epoch_gives_all_of_it() -> None:
    # A loop that saves after the last batch and begins again with the epoch after that.
    ours, resumed = loader(), loader()
    for _ in ours:
        state = ours.state_dict()
    resumed.load_state_dict(state)
    assert len(resumed) == 0
    resumed.sampler.set_epoch(1)
    assert len(resumed) == 9
    assert samples(resumed) == samples(ours)


def test_a_start_index_holds_for_one_epoch_whether_set_before_or_after_it() -> None:
    straight = loader(0, 2)
    expected = [batches(straight) for _ in range(4)]
    for order in ("epoch first", "start first"):
        ours = loader(0, 2)
        sampler = ours.sampler
        for call in ("epoch", "start") if order == "epoch first" else ("start", "epoch"):
            sampler.set_epoch(2) if call == "epoch" else sampler.set_start_index(6)
        assert len(ours) == 3
        assert batches(ours) == expected[2][2:]
        assert batches(ours) == expected[3]
    for wrong in (-1, 14):
        with pytest.raises(ValueError, match=f"from 0 to 13, a rank's samples, got {wrong}"):
            sampler.set_start_index(wrong)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"shuffle": False}, {"dataset": LIST[:-1]}], ids=str)
def test_a_state_of_another_order_is_refused(changed: dict[str, Any]) -> None:
    ours = loader()
    with pytest.raises(ValueError, match="same dataset, shuffle and seed"):
        ours.load_state_dict(loader(**changed).state_dict())
    assert samples(ours) == samples(loader())


# -- what users bring themselves


class Stateful(DistributedSampler[int]):
    pass


def test_a_sampler_class_of_the_user_gets_ranks_and_seed() -> None:
    of_ranks = loaders(2, distributed_sampler_cls=Stateful, drop_last=True)
    for rank, ours in enumerate(of_ranks):
        sampler = ours.sampler
        assert type(sampler) is Stateful
        assert (sampler.rank, sampler.num_replicas, sampler.shuffle) == (rank, 2, True)
        assert (sampler.seed, sampler.drop_last) == (3, True)


def test_samplers_of_the_user_are_used_as_they_are() -> None:
    last = SequentialSampler(LIST[:4])
    assert batches(loader(1, 2, shuffle=False, sampler=last)) == [[0, 1, 2], [3]]
    assert batches(loader(1, 2, batch=1, shuffle=False, batch_sampler=BatchSampler(last, 2, False))) == [[0, 1], [2, 3]]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


def test_a_stream_is_refused_where_every_rank_would_get_all_of_it() -> None:
    assert batches(loader(dataset=Stream(), shuffle=False)) == [[0, 1, 2], [3]]
    with pytest.raises(ValueError, match="Stream is an IterableDataset"):
        loader(0, 2, dataset=Stream(), shuffle=False)


def test_a_loader_that_a_library_made_anew_with_its_own_sampler_works() -> None:
    theirs = RankDataLoader(LIST, batch_size=13)
    assert len(batches(theirs)) == 2
    with pytest.raises(TypeError, match="a loader with a SequentialSampler"):
        theirs.state_dict()


# -- workers


class Draws(Dataset[list[float]]):
    """What the three generators of a worker draw, and the worker's number."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[float]:
        info = get_worker_info()
        assert info is not None
        return [random.random(), float(np.random.rand()), float(torch.rand(())), float(info.id)]


def marked(worker: int) -> None:
    np.random.seed(worker)


def test_workers_draw_other_numbers_on_other_ranks_and_the_same_when_repeated() -> None:
    def draws(rank: int, world_size: int) -> list[list[float]]:
        ours = loader(rank, world_size, dataset=Draws(), batch=1, num_workers=2)
        return [row for _ in range(2) for batch in ours for row in torch.stack(batch, 1).tolist()]

    one, first, second = draws(0, 1), draws(0, 2), draws(1, 2)
    drawn = [number for row in first + second for number in row[:3]]
    assert len(set(drawn)) == len(drawn) == 3 * 8
    assert draws(1, 2) == second
    assert one[:2] == first[:2]  # rank 0 is seeded as a single process is


def test_the_users_function_for_workers_is_called_last() -> None:
    ours = loader(1, 2, dataset=Draws(), batch=1, num_workers=2, worker_init_fn=marked)
    drawn = {batch[3].item(): batch[1].item() for batch in ours}
    assert drawn == {float(worker): np.random.RandomState(worker).rand() for worker in range(2)}


def test_the_plugin_deals_out_to_the_ranks_of_the_process_group(tmp_path: Path) -> None:
    ranks = starter().run(batches_of_a_loader, tmp_path)
    assert all(rank.is_well for rank in ranks), [rank.log for rank in ranks]
    first, second = (rank.value for rank in ranks)
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [2, 2, 1]
    assert sorted(chain.from_iterable(first + second)) == list(range(10))
