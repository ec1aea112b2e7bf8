"""Waits that are broken on purpose are noticed, each of them: as wrong numbers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_races
import test_uses_in_streams
import torch
from parity import check_equal, run_managed
from sim_tasks import LOOP_PLACEMENTS, PLACEMENTS, expected, in_folder, task
from simulated import SimulatedDevice
from test_parity import Clipped, Other, check_loop

from gemini.chunk import AcceleratorBackend, accelerator, accelerator_driver, gradient_pool
from gemini.chunk.write_behind import WriteBehind
from gemini.nn.optimizer.rules import pieces

pytestmark = pytest.mark.own_process()

SEEDS = 12
Patch = pytest.MonkeyPatch


def nothing(*_: Any, **__: Any) -> None:
    pass


def lane_that_follows_nobody(name: str) -> Callable[[Patch], None]:
    def broken(patch: Patch) -> None:
        make = AcceleratorBackend.__init__

        def init(self: Any, *arguments: Any, **more: Any) -> None:
            make(self, *arguments, **more)
            patch.setattr(getattr(self, name), "follow_current", nothing)

        patch.setattr(AcceleratorBackend, "__init__", init)

    return broken


def without(owner: Any, name: str, by: Any = nothing) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, by)


def forgotten_gradients(patch: Patch) -> None:
    class Forgetful(accelerator.deque):  # type: ignore[misc,type-arg]
        def append(self, item: Any) -> None:
            super().append((item[0], ()))

    patch.setattr(accelerator, "deque", Forgetful)


def waiting_outside_of_the_lane(self: Any, after: Any) -> None:
    if after is not None:
        after.wait()


def hasty_writes(patch: Patch) -> None:
    write, copy = WriteBehind.write, torch.Tensor.copy_

    def broken(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "copy_", lambda self, source: copy(self, source, non_blocking=True))
            write(*arguments)

    patch.setattr(WriteBehind, "write", broken)


def mark_before_the_work(patch: Patch) -> None:
    def put(self: Any, fill: Callable[[], None]) -> Any:
        mark = self._to_device.mark()
        self._to_device.put(fill)
        return mark

    patch.setattr(AcceleratorBackend, "_put", put)


def pieces_on_threads(patch: Patch) -> None:
    thread = ThreadPoolExecutor(1)
    patch.setattr(pieces, "run", lambda work, of, device: list(thread.map(torch.no_grad()(work), of)))


def trained(placement: str, own_stream: bool = False, **options: Any) -> Callable[[SimulatedDevice, int, Path], None]:
    def run(device: SimulatedDevice, seed: int, folder: Path) -> None:
        device.seed(seed)
        with torch.Stream("sim") if own_stream else nullcontext():
            check_equal(run_managed(task(), **in_folder(PLACEMENTS[placement], folder), **options)[0], expected())

    return run


def clipped(device: SimulatedDevice, seed: int, folder: Path) -> None:
    device.seed(seed)
    check_loop(Clipped(dict(LOOP_PLACEMENTS["host"])), Clipped(None))


def other_in_pieces(device: SimulatedDevice, seed: int, folder: Path) -> None:
    device.seed(seed)
    with pytest.MonkeyPatch.context() as patch, torch.Stream("sim"):
        patch.setattr(pieces, "_ACCELERATOR_PIECE_NUMEL", 512)
        check_loop(Other("SGD of Nesterov", {}), Other("SGD of Nesterov", None, place="sim"))


def dropped(device: SimulatedDevice, seed: int, folder: Path) -> None:
    test_races.test_a_model_that_is_dropped_does_not_write_to_memory_that_others_have_got(device)


def read_in_a_stream(device: SimulatedDevice, seed: int, folder: Path) -> None:
    norms = test_uses_in_streams.in_a_stream(test_uses_in_streams.norms)
    test_uses_in_streams.check(device, LOOP_PLACEMENTS["mixed"], between=norms)


def given_back(device: SimulatedDevice, seed: int, folder: Path) -> None:
    test_races.test_memory_goes_back_to_its_stream_behind_what_another_stream_does_with_it(device)


def lent(device: SimulatedDevice, seed: int, folder: Path) -> None:
    test_races.test_the_memory_of_a_gradient_is_lent_again_behind_the_update_that_reads_it(device)


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[..., None]]] = {
    "fetches do not follow the compute stream": (lane_that_follows_nobody("_to_device"), trained("all on host")),
    "gradients do not follow the compute stream": (lane_that_follows_nobody("_to_host"), trained("all on host")),
    "compute does not wait for fetches": (without(accelerator._OnLane, "wait"), trained("all on host")),
    "a mark holds nothing": (without(accelerator_driver._Event, "hold"), trained("mixed")),
    "a mark is where the lane was before": (mark_before_the_work, trained("all on host")),
    "the step does not wait for gradients": (without(AcceleratorBackend, "_wait_for_copies"), clipped),
    "updates in backward do not wait for gradients": (
        without(accelerator._Caller, "wait_for_downloads"),
        trained("all on host", update_in_backward=True),
    ),
    "the memory of gradients is not kept": (forgotten_gradients, trained("all on host")),
    "updates are in the stream of their thread": (
        without(accelerator._Caller, "stand_in", lambda self: nullcontext()),
        trained("device", own_stream=True),
    ),
    "the end of an update is not waited for": (without(accelerator._Caller, "mark"), trained("mixed")),
    "a fetch waits for an update outside of its lane": (
        without(AcceleratorBackend, "_wait_in_lane", waiting_outside_of_the_lane),
        trained("mixed"),
    ),
    "pieces of an update are in the streams of threads": (pieces_on_threads, other_in_pieces),
    "a model is dropped before its fetches are over": (without(accelerator_driver._Event, "wait"), dropped),
    "the memory of gradients is lent before its update is over": (
        without(gradient_pool._Idle, "taken", lambda self: self.block),
        lent,
    ),
    "training does not wait for a stream that reads": (without(AcceleratorBackend, "take_over"), read_in_a_stream),
    "memory goes back while another stream uses it": (
        without(accelerator_driver._Stream, "follow_current"),
        given_back,
    ),
    "gradients are written to disk before they have arrived": (hasty_writes, trained("disk")),
}
"""What is broken, and what then goes wrong."""


def goes_wrong(scenario: Callable[[], None]) -> bool:
    try:
        scenario()
    except AssertionError:
        return True
    return False


@pytest.mark.usefixtures("late_updates")
@pytest.mark.parametrize(("broken", "scenario"), BROKEN.values(), ids=BROKEN)
def test_a_broken_wait_is_wrong_numbers(
    device: SimulatedDevice,
    monkeypatch: Patch,
    tmp_path: Path,
    broken: Callable[[Patch], None],
    scenario: Callable[[SimulatedDevice, int, Path], None],
) -> None:
    broken(monkeypatch)
    assert any(goes_wrong(partial(scenario, device, seed, tmp_path)) for seed in range(SEEDS))
