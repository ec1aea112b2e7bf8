"""What there is of one memory, what is promised, and what each holder finds."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from gemini.lease import holder
from gemini.lease.folder import LeaseFolder
from gemini.lease.holder import Holder, Holds, own_standing, with_growth
from gemini.lease.limits import Limit, disk_limit, ram_limits, shared_ram_limits
from gemini.lease.pools import Pool, look
from gemini.lease.sharing import Claim
from gemini.lease.standing import HOST, Holding, Standing

GIB = 1 << 30


def limit(free: int, shared: bool = True) -> Limit:
    return Limit("a limit", free, 64 * GIB, shared, "the pool")


def standing(started: float, floor: int, wish: int, held: int, grown: int = 0, **more: int) -> Standing:
    holding = Holding(pools=("the pool",), floor=floor, wish=wish, held=held, grown=grown)
    pid = more.pop("pid", int(started))
    return Standing(job="job", program="p", pid=pid, started=started, holdings={HOST: holding}, **more)


def test_what_runs_have_taken_belongs_to_what_they_share() -> None:
    pool = Pool.of(limit(5 * GIB), HOST, {"a": standing(1, 0, 9 * GIB, 4 * GIB, grown=3 * GIB)})
    assert pool.total == 8 * GIB
    assert pool.promised == 4 * GIB
    assert pool.left_for("b") == 4 * GIB


def test_a_users_own_data_are_not_to_be_shared() -> None:
    pool = Pool.of(limit(5 * GIB), HOST, {"a": standing(1, 0, 9 * GIB, 4 * GIB, grown=7 * GIB)})
    assert pool.total == 9 * GIB


def test_what_a_limit_of_one_process_counts_is_taken_of_that_limit() -> None:
    of_process = {"a": standing(1, 0, 9 * GIB, 4 * GIB, grown=GIB)}
    assert Pool.of(limit(5 * GIB, shared=False), HOST, of_process, grown=3 * GIB).total == 8 * GIB


def test_leases_of_one_process_share_what_it_has_taken() -> None:
    both = {name: standing(i, 0, GIB, GIB, grown=3 * GIB, pid=7) for i, name in enumerate("ab")}
    assert Pool.of(limit(0), HOST, both).total == 2 * GIB


def test_only_those_under_a_limit_share_it() -> None:
    found = Pool.of(replace_pool(limit(GIB), "another"), HOST, {"a": standing(1, 0, GIB, GIB)})
    assert not found.members


def replace_pool(of: Limit, pool: str) -> Limit:
    return Limit(of.name, of.free, of.total, of.shared, pool)


def test_the_ranks_of_a_machine_ask_together_and_get_the_same_each() -> None:
    ranks = {
        "r0": standing(1, 0, 4 * GIB, 0, ranks=2),
        "r1": standing(2, 0, 4 * GIB, 0, ranks=2),
        "other": standing(3, 0, 8 * GIB, 0),
    }
    assert Pool.of(limit(8 * GIB), HOST, ranks).grants() == {"r0": 2 * GIB, "r1": 2 * GIB, "other": 4 * GIB}
    first = {name: ranks[name] for name in ("r0", "other")}  # the other rank has not come to it yet
    assert Pool.of(limit(8 * GIB), HOST, first).grants() == {"r0": 2 * GIB, "other": 4 * GIB}


def test_a_limit_of_each_rank_is_not_divided() -> None:
    ranks = {"r0": standing(1, 0, 4 * GIB, 0, ranks=2)}
    assert Pool.of(limit(3 * GIB, shared=False), HOST, ranks).grants() == {"r0": 3 * GIB}


def test_the_tightest_pool_decides() -> None:
    wide, narrow = limit(8 * GIB), replace_pool(limit(2 * GIB), "narrow")
    mine = standing(1, 0, 9 * GIB, 0)
    inside = replace(mine.holdings[HOST], pools=("the pool", "narrow"))
    both = {"a": replace(mine, holdings={HOST: inside}), "b": standing(2, 0, 4 * GIB, GIB)}
    found = look("a", [Pool.of(each, HOST, both) for each in (wide, narrow)])
    assert (found.grant, found.left, found.others) == (2 * GIB, 2 * GIB, 1)


def test_growth_counts_from_where_the_lease_began() -> None:
    mine = replace(standing(1, 0, 9 * GIB, 0), base_bytes=GIB)
    assert with_growth(mine, 3 * GIB).holdings[HOST].grown == 2 * GIB
    assert with_growth(mine, 0) is mine


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Holder, Holder]]:
    """Two holders in this process, which takes nothing, under one limit of 8 GiB."""
    monkeypatch.setattr(holder, "private_ram", lambda *_, **__: 1)
    found = tuple(
        Holder({HOST: lambda: [limit(8 * GIB)]}, own_standing(name, "p", 0, 1), LeaseFolder(tmp_path / "leases"))
        for name in "ab"
    )
    yield found  # type: ignore[misc]
    for each in found:
        each.end()


def test_a_second_holder_finds_what_the_first_leaves_and_its_share(two: tuple[Holder, Holder]) -> None:
    first, second = two
    first.say({HOST: Holds(claim=Claim(floor=0, wish=8 * GIB), held=8 * GIB)})
    second.say({HOST: Holds(claim=Claim(floor=0, wish=8 * GIB), held=0)}, is_waiting=True)
    found = second.look()[HOST]
    assert (found.grant, found.left, found.others) == (4 * GIB, 0, 1)
    first.say({HOST: Holds(claim=Claim(floor=0, wish=8 * GIB), held=4 * GIB)})
    assert second.wait(HOST, lambda seen: seen.left >= seen.grant, seconds=5).left == 4 * GIB


def test_waiting_for_room_has_an_end(two: tuple[Holder, Holder]) -> None:
    first, second = two
    first.say({HOST: Holds(claim=Claim(floor=8 * GIB, wish=8 * GIB), held=8 * GIB)})
    second.say({HOST: Holds(claim=Claim(floor=0, wish=8 * GIB), held=0)})
    assert second.wait(HOST, lambda seen: seen.left > 0, seconds=0.0).left == 0


def test_without_a_folder_for_leases_a_run_is_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "leases").write_text("a file")
    alone = Holder({HOST: lambda: [limit(8 * GIB)]}, own_standing("a", "p", 0, 1), LeaseFolder(tmp_path / "leases"))
    alone.say({HOST: Holds(claim=Claim(floor=0, wish=GIB), held=GIB)})
    assert alone.look()[HOST].grant == GIB
    assert alone.take_asked() is None
    assert "other runs cannot see" in caplog.text
    alone.end()


def test_a_group_has_one_name_wherever_it_is_seen_from(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    for name, text in (("memory.max", "1000"), ("memory.current", "10"), ("memory.stat", "")):
        (group / name).write_text(text)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / f"proc/{os.getpid()}").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / f"proc/{os.getpid()}/cgroup").write_text("0::/a/b/c\n")  # a group below it, without a limit of its own
    own, others = ram_limits(tmp_path), shared_ram_limits([os.getpid()], tmp_path)
    assert {each.pool for each in own} == others.keys()
    assert sorted(each.total for each in own) == [1000, 9 << 10]


def test_folders_on_one_file_system_are_one_pool(tmp_path: Path) -> None:
    assert disk_limit(tmp_path).pool == disk_limit(tmp_path / "not" / "yet").pool


def test_a_disk_that_takes_no_lease_is_said_once_and_ends_nothing(
    two: tuple[Holder, Holder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = two

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", full)
    for held in range(3):
        first.say({HOST: Holds(claim=Claim(floor=0, wish=GIB), held=held * GIB)})
    assert [record.message for record in caplog.records] == [
        "other runs do not hear what this one holds of the machine's memory: [Errno 28] No space left on device"
    ]
