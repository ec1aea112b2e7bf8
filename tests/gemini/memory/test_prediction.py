"""What a step takes of each tier is predicted after the warm-up, compared with what it takes, and shown."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from collected import collect_all
from loop import SMALL, batch, build
from stat_runs import GIB, make_run
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk.memory_map import MemoryMap
from gemini.chunk.tier import Tier
from gemini.memory.prediction import Outlook, Peaks, bytes_of_copies, measure, predict
from gemini.memory.timeline import Point
from gemini.nn.optimizer import HybridAdam
from gemini.planning.planner import Planner
from gemini.planning.trace import Moment, Phase, Trace
from gemini.stat.cli import main
from gemini.telemetry.layout import records_file

MIB = 1 << 20


class Training:
    """A small boosted model that writes every step of its telemetry into a folder of its own."""

    def __init__(self, folder: Path, model: nn.Module | None = None, **plugin: Any) -> None:
        collect_all()  # models of earlier tests, which would go while this one's memory is measured
        model = build() if model is None else model
        self.booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=folder, **plugin))
        self.model, self.optimizer, *_ = self.booster.boost(model, HybridAdam(model.parameters()))
        self.state = boosted(self.model)
        assert self.state.telemetry is not None
        self.writer = self.state.telemetry
        self.writer._min_interval = 0.0

    def step(self, count: int) -> None:
        for _ in range(count):
            self.booster.backward(self.model(batch(0)).square().mean(), self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_the_copies_of_a_cycle_are_counted_moment_by_moment() -> None:
    chance = random.Random(0)
    for _ in range(50):
        nbytes = {chunk: chance.randint(1, 9) for chunk in range(8)}
        uses = [chance.sample(range(8), 2) for _ in range(20)]
        trace = Trace(tuple(Moment(i, Phase.FORWARD, frozenset(chunks)) for i, chunks in enumerate(uses)))
        capacity = 24
        plan = Planner(trace, nbytes, capacity, depth=2).plan([0, 1])
        there, expected = {0, 1}, []
        for actions in plan.actions:
            for chunk in actions.evict:
                there.discard(chunk)
            there |= {*actions.fetch, *actions.prefetch}
            expected.append(sum(nbytes[chunk] for chunk in there))
        assert bytes_of_copies(plan, [0, 1], nbytes) == expected
        assert max(expected) <= capacity


def test_the_peak_is_that_of_the_sum() -> None:
    homes = {Tier.DEVICE: 100, Tier.HOST: 1000, Tier.DISK: 5}
    apart = predict(homes, [10, 40, 20], [30, 0, 15], MemoryMap.ACCELERATOR)
    assert apart == Peaks((140, 1000, 5), 30)
    unified = predict({**homes, Tier.DEVICE: 0}, [10, 40, 20], [30, 0, 15], MemoryMap.UNIFIED)
    assert unified == Peaks((40, 1040, 5), 30)
    other_moments = predict(homes, [10, 40], [30, 0, 15], MemoryMap.ACCELERATOR)
    assert other_moments.tiers[0] == 170  # nothing is known of when: both at once


def test_the_most_of_all_measured_steps_counts() -> None:
    first = measure([Point(0, "forward", (1, 50, 7), 5), Point(1, "backward", (2, 40, 7), 20)], Tier.HOST)
    assert first == Peaks((2, 60, 7), 20)
    seen = Outlook(Peaks((2, 60, 7), 20), first).after(Peaks((1, 90, 7), 3))
    assert seen.measured == Peaks((2, 90, 7), 20)
    assert seen.predicted == Peaks((2, 60, 7), 20)


@pytest.mark.parametrize(
    "plugin",
    [
        {},
        {"device_memory": "36KiB", **SMALL},
        {"host_memory": "300KiB", "disk_memory": "8MiB", **SMALL},
        {"host_memory": "300KiB", "disk_memory": "8MiB", "device_memory": "40KiB", **SMALL},
    ],
    ids=["resident", "streamed", "disk", "all three"],
)
def test_steps_take_what_was_predicted(plugin: dict[str, Any], tmp_path: Path) -> None:
    if "disk_memory" in plugin:
        plugin = {**plugin, "offload_dir": tmp_path}
    training = Training(tmp_path / "run", **plugin)
    training.step(1)
    assert "prediction/host_predicted_bytes" not in training.model.memory_stats()
    training.step(2)
    found = training.model.memory_stats()
    outlook = training.state.engine.listener.outlook
    assert outlook is not None
    where = 1 if found["memory/unified"] else 0
    points = training.state.engine.listener._last_points  # type: ignore[union-attr]
    for index, tier in enumerate(Tier):
        said, seen = (found[f"prediction/{tier.value}_{when}_bytes"] for when in ("predicted", "measured"))
        assert (said, seen) == (outlook.predicted.tiers[index], outlook.measured.tiers[index])
        if tier is Tier.DISK:
            assert said <= seen <= 2 * said  # the results of updates ahead of the step, as many as there were in time
        elif index != where:
            assert said == seen, tier  # model data to the byte
    used = max(point.used[where] for point in points)
    assert found[f"prediction/{tuple(Tier)[where].value}_predicted_bytes"] >= used
    training.writer.close()
    lines = records_file(tmp_path / "run", 0).read_text().splitlines()
    records = [json.loads(line) for line in lines if line]
    steps = [record["stats"] for record in records if record["type"] == "step"]
    assert "prediction/host_measured_bytes" not in steps[0]
    assert steps[-1]["prediction/host_measured_bytes"] == found["prediction/host_measured_bytes"]


# What threads of earlier tests have freed at the end of their arenas would go while this one measures: malloc gives it
# back only when the same arena frees something again.
@pytest.mark.own_process(MALLOC_ARENA_MAX="1")
@pytest.mark.parametrize("where", ["RAM", "disk", "memory that is lent"])
def test_memory_for_gradients_and_staging_is_model_data_from_the_start(where: str, tmp_path: Path) -> None:
    """If its pages came at first use they would pass for non-model data, or cover what is."""
    layers = [nn.Linear(batch(0).shape[-1], 2048), *(nn.Linear(2048, 2048) for _ in range(4))]
    disk = {"host_memory": "160MiB", "disk_memory": "1GiB", "offload_dir": tmp_path} if where == "disk" else {}
    lends = {"update_in_backward": True} if where == "memory that is lent" else {}
    training = Training(tmp_path / "run", nn.Sequential(*layers), **disk, **lends)
    training.step(3)
    points = training.state.engine.listener._last_points  # type: ignore[union-attr]
    assert points[0].non_model < 4 * MIB  # a batch
    assert max(point.non_model for point in points) > 12 * MIB  # a gradient of 16 MiB on its way to its chunk
    outlook = training.state.engine.listener.outlook
    assert outlook is not None
    assert outlook.measured.non_model - outlook.predicted.non_model < 6 * MIB


def test_what_malloc_kept_of_earlier_steps_is_no_part_of_a_step_that_is_sampled(tmp_path: Path) -> None:
    layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh())]
    training = Training(tmp_path / "run", nn.Sequential(*layers))
    x, sampling = torch.randn(2048, 256), training.state.engine.sampling
    for step in range(6):
        sampling.record_step(step == 5)
        training.booster.backward(training.model(x).square().mean(), training.optimizer)
        taken = [point.non_model for point in sampling.timeline.points]
        training.optimizer.step()
        training.optimizer.zero_grad()
    assert max(taken) > 30 * MIB  # 24 activations, of up to 2 MiB
    assert taken[-2] < max(taken) / 2  # they go one by one in backward


class Keeps(nn.Module):
    """Keeps 48 MiB more with every forward, which the warm-up cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = build()
        self.kept: list[bytearray] = []

    def forward(self, x: Any) -> Any:
        self.kept.append(bytearray(b"1") * (48 << 20))
        return self.layers(x)


def test_a_step_that_takes_more_than_predicted_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training(tmp_path / "run", Keeps())
    training.step(3)
    outlook = training.state.engine.listener.outlook
    assert outlook is not None
    assert outlook.measured.non_model - outlook.predicted.non_model > 40 * MIB
    training.writer.close()
    run = str(tmp_path / "run")
    assert main([run, "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)["prediction"]
    assert prediction["host_predicted_bytes"] == outlook.predicted.tiers[1]
    assert prediction["host_measured_bytes"] == outlook.measured.tiers[1]
    assert main(["dmon", run, "-c", "1", "--json"]) in (0, 5)
    advice = json.loads(capsys.readouterr().out.splitlines()[-1])["advice"]
    assert any("keeps tensors from step to step" in item["text"] for item in advice)


@pytest.mark.parametrize(
    ("measured", "growth", "text"),
    [
        (10.5, 0.4, None),
        (12, 2, "batches are heavier than the first one"),
        (12, 0.1, "full copies stay that the plan lets go"),
        (8, -2, "larger ones have room"),
    ],
)
def test_advice_says_why_it_may_be_off(
    measured: float, growth: float, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"device_predicted": 10, "device_measured": measured, "non_model_predicted": 2}
    values["non_model_measured"] = 2 + growth
    run = str(make_run(2, **{f"prediction/{name}_bytes": value * GIB for name, value in values.items()}))
    assert main(["dmon", run, "-c", "1", "--json"]) in (0, 5)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    said = [item["text"] for item in rows[-1]["advice"] if "were predicted" in item["text"]]
    assert len(said) == (text is not None)
    assert text is None or text in said[0]
    off = f"{measured / 10 - 1:+.0%}"
    assert main([run]) == 0
    shown = capsys.readouterr().out
    assert "10.0 GiB peak of device" in shown
    assert f"{off} off" in shown
    assert main(["top", run]) == 0
    assert f"device: predicted 10.0 GiB, measured {measured:.1f} GiB ({off})" in capsys.readouterr().out
