"""The room for full copies follows what non-model data are measured to take, also when the batch changes."""

from typing import Any

import torch
from parity import masters
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import Tier
from gemini.memory.non_model import Batch
from gemini.nn.optimizer import HybridAdam

WIDTH, DEPTH = 32, 10
COPY = WIDTH * (WIDTH + 1) * 2


class Meter:
    """Non-model data as the test says: some bytes for each row of the batch, at the turn from forward to backward."""

    def __init__(self) -> None:
        self.rows = 0
        self.samples = 0
        self.peak_bytes = self.last_bytes = 0

    def sample(self, model_bytes: int) -> None:
        self.samples += 1
        self.last_bytes = self.rows * COPY if self.samples % 7 == 0 else 1
        self.peak_bytes = max(self.peak_bytes, self.last_bytes)

    def mark(self) -> None:
        pass


class Training:
    """A small model on an emulated device of six full copies, of which activations may take part."""

    def __init__(self, **plugin: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        options = {"device_memory": 6 * COPY, "placement_policy": "static", "offload_optim_frac": 1.0, **plugin}
        chunks = {1: {"chunk_size": WIDTH * (WIDTH + 1)}}
        self.booster = Booster(plugin=GeminiPlugin(telemetry=False, chunk_config_dict=chunks, **options))
        self.model, self.optimizer, *_ = self.booster.boost(model, HybridAdam(model.parameters()))
        self.engine = boosted(self.model).engine
        self.meter = Meter()
        self.engine.sampling.meter = self.meter  # type: ignore[assignment]
        self.engine.room._limit_bytes = 14 * COPY

    def step(self, rows: int) -> int:
        """Train on a batch of ``rows``; the capacity while it ran."""
        self.meter.rows = rows
        loss = self.model(torch.ones(rows, WIDTH)).float().square().mean()
        capacity = self.engine.manager.ledger.capacity(Tier.DEVICE)
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.engine.manager.ledger.used(Tier.DEVICE) <= capacity
        return capacity // COPY


def test_after_the_first_step_full_copies_get_what_activations_leave() -> None:
    training = Training()
    assert [training.step(4) for _ in range(3)] == [6, 10, 10]
    samples = training.meter.samples
    training.step(4)
    assert training.meter.samples == samples  # only the first was measured


def test_a_larger_batch_gets_its_room_before_it_runs_and_is_measured_again() -> None:
    training = Training()
    training.step(2)
    assert training.step(2) == 12
    assert training.step(6) == 8  # 14 less three times what two rows took
    assert [training.step(6) for _ in range(2)] == [8, 8]
    assert training.step(2) == 8  # nothing is given back for a small batch: a large one may follow
    assert training.engine.sampling.profile.heaviest[True].batch == Batch(True, ((6, WIDTH),))
    misses = training.model.memory_stats()["need/miss_count"]
    assert training.step(6) == 8
    assert training.model.memory_stats()["need/miss_count"] == misses  # there is a plan for the smaller room
    assert training.model.memory_stats()["move/evict_count"] > 0


def test_what_is_expected_of_a_larger_batch_is_put_right_when_it_has_been_measured() -> None:
    training = Training()
    training.step(2)
    training.step(2)
    training.meter.rows = 0
    loss = training.model(torch.ones(6, WIDTH)).float().square().mean()  # expected to take six, takes next to nothing
    training.booster.backward(loss, training.optimizer)
    training.optimizer.zero_grad()
    training.meter.rows = 6
    assert training.step(6) == 13


def test_the_room_never_falls_below_what_one_unit_needs() -> None:
    training = Training()
    training.step(2)
    assert training.step(60) >= 1
    assert training.step(60) >= 1


def test_numbers_do_not_depend_on_the_room() -> None:
    free, tight = Training(device_memory="1GiB"), Training()
    for training in (free, tight):
        for rows in (2, 6, 2, 8):
            training.step(rows)
    ours, theirs = masters(free.model), masters(tight.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_capacity_that_the_user_gave_stays() -> None:
    training = Training()
    training.engine.room._limit_bytes = None
    assert [training.step(rows) for rows in (2, 2, 8, 8)] == [6] * 4
