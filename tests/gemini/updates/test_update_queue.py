"""The background optimizer: exact, in order, and all or nothing when the disk fails."""

import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from update_rig import HYPER, IN_RAM, MIXED, ON_DISK, Faults, Rig, content, rig, runs_of, wait_for_all

from gemini.chunk import MASTER, NoDevice, Tier, workers
from gemini.errors import OffloadError
from gemini.nn.optimizer.kernels.arithmetic import scalars
from gemini.nn.optimizer.rules.adam_rule import AdamUpdate
from gemini.updates.ticket import Ticket
from gemini.updates.update_pipeline import ChunkUpdate, Run
from gemini.updates.update_queue import UpdateQueue

pytestmark = pytest.mark.timeout(60)

PLACES = {"disk": [ON_DISK] * 3, "mixed": [MIXED, ON_DISK, IN_RAM], "ram": [IN_RAM] * 3}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_several_steps_give_the_bits_of_the_plain_update_wherever_the_homes_are(
    tmp_path: Path, places: list[dict[str, Tier]]
) -> None:
    with rig(tmp_path, places, Faults()) as r:
        for _ in range(3):
            wait_for_all(r.submit())
            r.check()


def test_steps_submitted_one_after_the_other_run_one_after_the_other(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["mixed"], Faults()) as r:
        tickets = [ticket for _ in range(4) for ticket in r.submit()]
        assert wait_for_all(tickets) == []
        r.check()


def count_calls(folder: Path, work: Callable[[Rig], object], places: list[dict[str, Tier]]) -> int:
    faults = Faults()
    with rig(folder, places, faults) as r:
        work(r)
        return faults.calls


@pytest.mark.parametrize("places", [PLACES["disk"][:2], PLACES["mixed"]], ids=["disk", "mixed"])
def test_a_failure_of_any_one_call_surfaces_once_and_then_costs_nothing(
    tmp_path: Path, places: list[dict[str, Tier]]
) -> None:
    for k in range(count_calls(tmp_path, lambda r: wait_for_all(r.submit()), places)):
        with rig(tmp_path, places, Faults(k)) as r:
            errors = wait_for_all(r.submit())
            (error,) = errors
            assert f"call {k} fails" in str(error)
            assert re.search(r"in the optimizer's update of w(, w)* (and \d more )?\(chunk \d\)", str(error)), error
            r.check()
            assert wait_for_all(r.submit()) == []
            r.check()


def test_steps_stay_in_order_if_any_one_call_fails_before_a_wait(
    tmp_path: Path,
) -> None:
    def two_steps(r: Rig) -> list[BaseException]:
        return wait_for_all([*r.submit(0), *r.submit(1, 0), *r.submit(2)])

    for k in range(count_calls(tmp_path, two_steps, PLACES["disk"])):
        with rig(tmp_path, PLACES["disk"], Faults(k)) as r:
            assert len(two_steps(r)) >= 1
            r.check()


@pytest.mark.parametrize("seed", range(20))
def test_many_failures_in_a_row_lose_nothing(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    with rig(tmp_path, PLACES["disk"], Faults(*generator.sample(range(400), 60))) as r:
        for _ in range(2):
            wait_for_all([ticket for _ in range(2) for ticket in r.submit()])
            r.check()


def test_as_long_as_the_disk_is_broken_every_wait_raises_and_nothing_hangs(tmp_path: Path) -> None:
    faults = Faults()
    with rig(tmp_path, PLACES["disk"], faults) as r:
        faults.always = True
        tickets = r.submit()
        for _ in range(3):
            for ticket in tickets:
                with pytest.raises(OffloadError):
                    ticket.wait()
        faults.always = False
        wait_for_all(tickets)
        r.check()


def test_a_step_behind_one_that_failed_fails_and_is_retried_with_it(tmp_path: Path) -> None:
    faults = Faults()
    with rig(tmp_path, PLACES["disk"], faults) as r:
        faults.always = True
        (first,) = r.submit(0)
        with pytest.raises(OffloadError):
            first.wait()
        (second,) = r.submit(1)
        with pytest.raises(OffloadError):
            second.wait()
        faults.always = False
        wait_for_all([second, first])
        r.check()


def test_chunks_are_over_in_the_order_submitted(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, IN_RAM] * 10, Faults()) as r:
        tickets = r.submit()
        for i in (3, 10, 19):
            tickets[i].wait()
            assert all(ticket.done() for ticket in tickets[: i + 1])
        r.check()


def test_many_chunks_stream_through_a_staging_of_tiny_blocks(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, MIXED] * 20, Faults(), tensors=7, numel=100) as r:
        assert wait_for_all(r.submit()) == []
        r.check()


def test_a_chunk_in_ram_needs_no_staging(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["ram"], Faults()) as r:
        plain = UpdateQueue(None)
        r.queue.close()
        r.queue = plain
        wait_for_all(r.submit())
        r.check()


def test_the_full_copy_is_refreshed_in_the_same_pass_where_there_was_a_gradient(tmp_path: Path) -> None:
    with rig(tmp_path, [ON_DISK, IN_RAM], Faults()) as r:
        for chunk in r.chunks:
            chunk.full.fill_(7.0)
        at_step = AdamUpdate("fp32", scalars(HYPER, 1))
        updates = [ChunkUpdate(chunk, runs_of(chunk.layout, at_step), chunk.full) for chunk in r.chunks]
        wait_for_all(r.queue.submit(updates, NoDevice()))
        for chunk in r.chunks:
            expected = torch.full_like(chunk.full, 7.0)
            for run in runs_of(chunk.layout, at_step):
                expected[run.start : run.stop] = content(chunk, MASTER)[run.start : run.stop].bfloat16()
            assert torch.equal(chunk.full, expected)


def test_an_update_of_no_elements_is_over_at_once(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        empty = ChunkUpdate(r.chunks[0], (Run(32, 32, AdamUpdate("fp32", scalars(HYPER, 1))),), None)
        nothing = ChunkUpdate(r.chunks[0], (), None)
        assert all(ticket.done() for ticket in r.queue.submit([empty, nothing], NoDevice()))
        assert r.queue.submit([], NoDevice()) == []
        r.check()


def test_an_error_in_the_arithmetic_surfaces_too_and_changes_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        run = Run(0, 50, AdamUpdate("fp32", scalars(HYPER, 1)))
        wrong = ChunkUpdate(r.chunks[0], (run,), torch.empty(1000, dtype=torch.float64))
        (ticket,) = r.queue.submit([wrong], NoDevice())
        for _ in range(2):
            with pytest.raises(TypeError, match="out must be"):
                ticket.wait()
        r.check()


def test_closing_finishes_what_is_pending_and_closing_again_does_nothing(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["mixed"], Faults()) as r:
        tickets = [*r.submit(), *r.submit()]
        r.queue.close()
        assert all(ticket.done() for ticket in tickets)
        r.check()
        r.queue.close()


def test_the_update_thread_itself_may_close_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The garbage collector runs there too, and it closes models that were dropped.
    monkeypatch.setattr(workers, "END_SECONDS", 0.1)
    with rig(tmp_path, PLACES["disk"], Faults()) as r:
        tickets = r.submit()
        r.queue._thread.submit(r.queue.close).result(30)
        wait_for_all(tickets)
        r.check()


def test_after_closing_a_failed_update_still_says_why(tmp_path: Path) -> None:
    with rig(tmp_path, PLACES["disk"], Faults(3)) as r:
        tickets = r.submit()
        r.queue.close()
        for _ in range(2):
            with pytest.raises(OffloadError, match="call 3 fails"):
                tickets[-1].wait()


def test_a_waiter_that_wakes_after_another_began_the_retry_waits_for_the_retry(tmp_path: Path) -> None:
    with rig(tmp_path, [IN_RAM], Faults()) as r:
        ticket = Ticket(r.queue.retry, 1)
        seen: list[object] = []

        def wait() -> None:
            try:
                ticket.wait()
                seen.append(ticket.done())
            except OffloadError:
                seen.append("the error")

        waiter = threading.Thread(target=wait)
        waiter.start()
        ticket.fail(OffloadError(5, "once"))
        ticket.reopen()
        waiter.join(0.2)
        ticket.finish_block(None)
        waiter.join(30)
        assert seen in ([True], ["the error"])  # never that it was over before it was


def refuse_some(patch: pytest.MonkeyPatch, of: str, refused: set[int]) -> list[int]:
    """Have these submissions to a pool (by their number) find no memory. Returns the list that counts them."""
    submit, count = ThreadPoolExecutor.submit, [0]

    def counted(self: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> Any:
        if not self._thread_name_prefix.endswith(of):  # type: ignore[attr-defined]
            return submit(self, *args, **kwargs)
        number, count[0] = count[0], count[0] + 1
        if number in refused:
            raise MemoryError
        return submit(self, *args, **kwargs)

    patch.setattr(ThreadPoolExecutor, "submit", counted)
    return count


@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_could_not_be_handed_over_has_not_begun(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rig(tmp_path, PLACES[place], Faults()) as r:
        with monkeypatch.context() as patch:
            refuse_some(patch, "memory-update", {0})
            before = [{name: value.clone() for name, value in values.items()} for values in r.expected]
            with pytest.raises(MemoryError):
                r.submit()
        r.expected, r.steps = before, 0
        assert not r.queue._pipeline.left
        r.check()
        wait_for_all(r.submit())
        r.check()


def test_a_retry_that_could_not_be_handed_over_is_made_by_the_next_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults()
    with rig(tmp_path, PLACES["disk"], faults) as r:
        faults.always = True
        tickets = r.submit()
        with pytest.raises(OffloadError):
            tickets[0].wait()
        for ticket in tickets:
            ticket.rest(20)
        faults.always = False
        with monkeypatch.context() as patch:
            refuse_some(patch, "memory-update", {0})
            with pytest.raises(MemoryError):
                tickets[0].wait()
        wait_for_all(tickets)
        r.check()


def test_a_failure_to_hand_over_any_one_move_of_a_block_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = 0
    while True:
        with rig(tmp_path / str(number), PLACES["disk"], Faults()) as r:
            with monkeypatch.context() as patch:
                count = refuse_some(patch, "update-io", {number})
                tickets = r.submit()
                errors = wait_for_all(tickets)
            r.check()
            staging = r.queue._staging
            assert staging is not None and staging.free_count == staging.count
            assert len(errors) == (count[0] > number)
        if count[0] <= number:
            break
        number += 5
    assert number > 10
