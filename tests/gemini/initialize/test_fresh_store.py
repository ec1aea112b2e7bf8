"""Each start of the ranks has a part of the store of its own, whatever earlier starts have left there."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from gemini.initialize.fresh_store import fresh_store

LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=0.5)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def started(store: dist.Store, ranks: int) -> list[dist.Store]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: fresh_store(store, rank, ranks, LONG), range(ranks)))


def test_the_ranks_of_a_start_share_a_part() -> None:
    stores = started(dist.HashStore(), 3)
    stores[1].set("address", "here")
    assert [store.get("address") for store in stores] == [b"here"] * 3


def test_another_start_sees_nothing_of_an_earlier_one() -> None:
    store = dist.HashStore()
    started(store, 2)[0].set("address", "gone")
    assert [new.check(["address"]) for new in started(store, 2)] == [False, False]


def test_a_rank_that_is_ahead_of_rank_0_does_not_join_the_earlier_start() -> None:
    # What a restart looks like where the other ranks' imports take less time than those of rank 0.
    store = dist.HashStore()
    earlier = started(store, 2)[0]
    ours = dist.PrefixStore("gemini_memory", store)
    name = ours.get("start").decode()
    former_token = ours.get(f"{name}/1")
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(fresh_store, store, 1, 2, LONG)
        until(lambda: ours.get(f"{name}/1") != former_token)  # it has found the earlier start's name
        new = fresh_store(store, 0, 2, LONG)
        new.set("address", "here")
        assert other.result(60).get("address") == b"here"
    assert not earlier.check(["address"])


def test_ranks_that_do_not_come_are_named() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(fresh_store, store, 2, 4, SHORT)
        with pytest.raises(dist.DistStoreError, match=r"ranks \[1, 3\] did not arrive"):
            fresh_store(store, 0, 4, 2 * SHORT)
        with pytest.raises(dist.DistStoreError, match="rank 0 did not answer"):
            other.result(60)


def test_rank_0_is_missed() -> None:
    with pytest.raises(dist.DistStoreError, match="rank 0 did not answer"):
        fresh_store(dist.HashStore(), 1, 2, SHORT)
