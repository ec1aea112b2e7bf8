"""A boosted model as an object: what reads right, what is refused, what is held to the byte."""

import copy
import pickle

import pytest
import torch
from loop import SMALL, Trained, check_same
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MASTER, Tier
from gemini.memory.non_model import Measured


def test_a_parameter_away_from_its_chunk_shows_its_values() -> None:
    run = Trained({"device_memory": "24KiB", **SMALL})
    run.step(0)
    away = [c for c in boosted(run.model).manager.chunks if not c.is_resident]
    assert away
    parameter = away[0].bindings[0].parameter
    assert torch.equal(parameter, boosted(run.model).manager.read(parameter, MASTER))


def test_accessors_show_the_values_after_a_step() -> None:
    ours, plain = Trained({}), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.step(0)
    for (_, a), b in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copying_pickling_and_moving_a_boosted_model_are_refused_with_a_way_out() -> None:
    model = Trained({}).model
    for forbidden, hint in (
        (lambda: copy.deepcopy(model), "state_dict"),
        (lambda: pickle.dumps(model), "save_model"),
        (lambda: model.half(), "precision"),
        (lambda: model.to("meta"), "chunks decide"),
        (lambda: copy.copy(model), "copy.copy"),
    ):
        with pytest.raises(RuntimeError, match=hint):
            forbidden()


def test_zero_grad_of_the_model_forgets_the_gradients_in_the_chunks() -> None:
    ours, plain = Trained({}), Trained(None)
    for run in (ours, plain):
        torch.manual_seed(7)
        run.backward(run.loss(0))
        run.model.zero_grad()
        run.step(1)
    check_same(ours, plain)


def test_static_fractions_bound_what_is_on_the_device() -> None:
    for optim, param in ((1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.0)):
        plugin = {"placement_policy": "static", "offload_optim_frac": optim, "offload_param_frac": param}
        run = Trained({"device_memory": "4MiB", **SMALL}, precision="bf16", **plugin)
        for step in range(3):
            run.step(step)
        stats = run.model.memory_stats()
        manager = boosted(run.model).manager
        homes = sum(h.nbytes for c in manager.chunks for h in c.homes.values() if h.tier is Tier.DEVICE)
        homes += sum(c.gradient.buffer.nbytes for c in manager.chunks if c.gradient.buffer.tier is Tier.DEVICE)
        chunk = max(
            stats["model_data/total_bytes"] * c.layout.numel // sum(d.layout.numel for d in manager.chunks)
            for c in manager.chunks
        )
        assert (
            (1 - optim) * stats["model_data/total_bytes"] - chunk
            <= homes
            <= (1 - optim) * stats["model_data/total_bytes"]
        )
        copies = sum(c.full_nbytes for c in manager.chunks)
        assert stats["device/peak_bytes"] - homes <= max(
            (1 - param) * copies, 2 * max(c.full_nbytes for c in manager.chunks)
        )


def test_the_device_grows_by_what_the_warm_up_shows_to_be_free() -> None:
    run = Trained({"device_memory": "36KiB", **SMALL})
    state = boosted(run.model)
    state.engine.room._limit_bytes = 200 << 10
    run.step(0)
    run.step(1)  # which finds the first one measured
    heaviest = state.engine.sampling.profile.heaviest
    heaviest[True] = Measured(heaviest[True].batch, (50 << 10,))  # not what the resident set happens to say
    run.step(2)
    assert run.model.memory_stats()["device/capacity_bytes"] == 150 << 10
    for step in range(3, 5):
        run.step(step)
    assert 36 << 10 < run.model.memory_stats()["device/peak_bytes"] <= 150 << 10


def test_a_sparse_embedding_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Embedding(8, 8, sparse=True))
    with pytest.raises(ValueError, match="sparse=False"):
        Booster(plugin=GeminiPlugin(telemetry=False)).boost(model)
    assert not model[0].weight.isnan().any()


def test_asking_for_one_parameter_does_not_wait_for_the_updates_of_all() -> None:
    run = Trained(SMALL)
    run.step(0)
    chunks = boosted(run.model).manager.chunks
    assert len(chunks) > 1
    waited: list[int] = []
    boosted(run.model).manager.eviction.evict_idle()
    for chunk in chunks:
        chunk.settle()
        chunk.begin_update(RecordsWait(waited, chunk.index), ())
    next(run.model.parameters()).norm()
    assert waited == [boosted(run.model).manager.find(run.model[0].weight)[0].index]


class RecordsWait:
    def __init__(self, waited: list[int], index: int) -> None:
        self.waited, self.index = waited, index

    def wait(self) -> None:
        self.waited.append(self.index)

    def done(self) -> bool:
        return True

    def rest(self, seconds: float) -> None:
        pass
