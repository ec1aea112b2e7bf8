"""gemini-stat estimate: what it says is what training does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from loop import SMALL, batch, build
from torch import nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk import MemoryMap, Requests, Tier, tuned
from gemini.chunk.disk_tuning import LEAST_TIER_BYTES
from gemini.config import GeminiConfig
from gemini.estimate.activations import Activations, repeated_layers
from gemini.estimate.demand import Machine, ModelData, as_argument, demand, model_bytes, room_for_copies
from gemini.estimate.disk_bench import file_system
from gemini.estimate.solve import largest, solve_batch_size, solve_memory
from gemini.estimate.step_model import streamed_copies
from gemini.estimate.storages import StorageMeter
from gemini.estimate.subject import NotFound, Subject, find_subject
from gemini.nn.optimizer import HybridAdam
from gemini.sizes import parse_bytes
from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema
from gemini.stat.rates import hardware_file
from gemini.telemetry.layout import disks_folder

GPT2 = ["gpt2", "--set", "n_embd=64", "--set", "n_head=4", "--set", "n_layer=5", "--set", "vocab_size=256"]
SIZES = {"n_embd": 64, "n_head": 4, "n_layer": 5, "vocab_size": 256}
MIB = 1 << 20


def subject_of(make: Any) -> Subject:
    return Subject("test", make, lambda size, length: {"input": torch.zeros(size, 64)})


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "mixtral"])
def test_two_and_three_layers_tell_the_rest(kind: str) -> None:
    fields = {
        "gpt2": SIZES,
        "llama": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_hidden_layers": 6},
        "t5": {"d_model": 64, "num_heads": 4, "d_kv": 16, "d_ff": 128, "num_layers": 5, "num_decoder_layers": 4},
        "mixtral": {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
            "num_hidden_layers": 5, "num_local_experts": 4,
        },
    }[kind]  # fmt: skip
    subject = find_subject(kind, {"vocab_size": 128, **fields})
    activations = Activations(subject, torch.bfloat16, checkpointing=False)
    assert activations._lists
    lengths = [len(layers) for layers in activations._lists]
    assert activations.tracked_bytes(2, 32) == activations._measured(lengths, 2, 32).peak_bytes


def test_fake_tensors_count_what_real_ones_do() -> None:
    def run(model: nn.Module) -> int:
        meter = StorageMeter()
        meter.leave_out(list(model.parameters()))
        inputs = batch(0, rows=64)
        meter.see(inputs)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with meter:
            model(inputs).mean().backward()
        return meter.peak_bytes

    subject = Subject("test", build, lambda size, length: {"input": torch.zeros(size, 64)})
    assert Activations(subject, torch.float32, checkpointing=False).tracked_bytes(64, 1) == run(build())


def test_checkpointing_takes_less() -> None:
    subject = find_subject("gpt2", SIZES)
    full, less = (Activations(subject, torch.float32, checkpointing=on).tracked_bytes(4, 64) for on in (False, True))
    assert less < full / 2


def test_only_alike_layers_are_cut() -> None:
    alike = nn.ModuleList([nn.Linear(4, 4) for _ in range(6)])
    unlike = nn.ModuleList([nn.Linear(4, i + 1) for i in range(6)])
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4) for _ in range(5)]) for _ in range(5)])
    few = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    assert repeated_layers(nn.ModuleList([alike, unlike, nested, few])) == [alike, nested]


@pytest.mark.one_in(3)
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
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", HybridAdam), ("bf16", HybridAdam), ("bf16", torch.optim.SGD), ("fp32", torch.optim.Adagrad)],
)
def test_model_data_peak_where_the_estimate_says(
    plugin: dict[str, Any], precision: str, optimizer: Any, tmp_path: Path
) -> None:
    arguments = {**plugin, "precision": precision, "telemetry": False}
    if "disk_memory" in plugin:
        arguments["offload_dir"] = tmp_path
    booster = Booster(plugin=GeminiPlugin(**arguments))
    config = booster.plugin.config
    model = build()
    model, optimizer, *_ = booster.boost(model, optimizer(model.parameters()))
    for number in range(3):
        booster.backward(model(batch(number)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    from gemini.boosted import boosted

    limits = boosted(model).capacities.nbytes
    memory = boosted(model).capacities.memory
    data = ModelData(subject_of(build), config, optimizer.rule.slots(optimizer.param_groups[0]))
    expected = model_bytes(data.pack(limits, memory), limits)
    stats = model.memory_stats()
    for tier in Tier:
        measured = stats[f"{tier.value}/peak_bytes"]
        slack = max(chunk.full_nbytes for chunk in boosted(model).manager.chunks)
        assert tier is Tier.DISK or abs(expected[tier] - measured) <= slack, tier
    # Beside the homes the results of updates ahead of the step, as many as there were in time.
    assert expected[Tier.DISK] <= stats["disk/peak_bytes"] <= 2 * expected[Tier.DISK]


def test_solutions_fit_and_more_does_not() -> None:
    subject = find_subject("gpt2", SIZES)
    data = ModelData(subject, GeminiConfig())
    activations = Activations(subject, torch.bfloat16, checkpointing=False)
    machine = Machine(device_bytes=None, ram_bytes=48 * MIB, disk_bytes=0)
    size = solve_batch_size(data, activations, machine, 32)
    assert size > 1
    assert demand(data, activations.peak_bytes(size, 32), machine).fits
    assert not demand(data, activations.peak_bytes(size + 1, 32), machine).fits
    non_model = activations.peak_bytes(4, 32)
    least = solve_memory(data, non_model, machine, "host")
    assert least is not None
    at = {ram: demand(data, non_model, Machine(device_bytes=None, ram_bytes=ram, disk_bytes=0)).fits
          for ram in (least, least - MIB)}  # fmt: skip
    assert at == {least: True, least - MIB: False}
    tight = Machine(device_bytes=None, ram_bytes=least - MIB, disk_bytes=0)
    on_disk = solve_memory(data, non_model, tight, "disk")
    assert on_disk is not None
    assert on_disk > 0


@pytest.mark.parametrize("limit", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("curve", [lambda n: 5 * n, lambda n: 1000 + 3 * n + n * n, lambda n: n // 10 * 10])
def test_the_largest_is_found_in_few_tries(limit: int, multiple: int, curve: Callable[[int], int]) -> None:
    tried = []

    def need(n: int) -> int | None:
        tried.append(n)
        return curve(n)

    fitting = [n for n in range(multiple, 2000, multiple) if curve(n) <= curve(limit)]
    assert largest(need, curve(limit), 1 << 20, multiple) == max(fitting, default=0)
    assert len(tried) == len(set(tried)) <= 15


@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_what_is_too_large_for_another_reason_bounds_the_largest(limit: int) -> None:
    assert largest(lambda n: n if n <= limit else None, 1 << 20, 1 << 20) == limit
    assert largest(lambda n: n if n <= limit else None, 1 << 20, 1 << 20, 32) == limit // 32 * 32
    with pytest.raises(ValueError, match="up to 100"):
        largest(lambda n: n, 1 << 20, 100)


def test_arguments_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *GPT2, "--ram", "48MiB", "--disk", "1GiB", "-b", "4", "-s", "32", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": "#/$defs/estimate", "$defs": schema["$defs"]}).validate(content)
    plugin = eval(content["arguments"], {"GeminiPlugin": GeminiPlugin})
    assert plugin.config.host_memory < 48 * MIB
    assert content["tiers"]["host"]["peak_bytes"] <= 48 * MIB


def test_each_optimizer_has_its_own_states(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for optimizer in ("AdamW", "SGD", "SGD momentum=0.9", "RMSprop momentum=0.9 centered=true", "Adam amsgrad=true"):
        assert main(["estimate", *GPT2, "--ram", "1GiB", "--json", "--optimizer", *optimizer.split()]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["optimizer"] == optimizer
        found[optimizer] = content["terms"]["moments"] / content["terms"]["masters"]
    assert list(found.values()) == [2, 0, 1, 3, 3]
    for wrong, reason in (
        ("Adamw", "the name of one of torch.optim"),
        ("LBFGS", "searches along directions"),
        ("SGD momentum", "must be NAME=VALUE, got 'momentum'"),
        ("SGD nonsense=1", "nonsense"),
        ("AdamW differentiable=true", "does not support differentiable"),
    ):
        assert main(["estimate", *GPT2, "--optimizer", *wrong.split()]) == 2
        assert reason in capsys.readouterr().err


def test_what_does_not_fit_exits_3_and_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *GPT2, "--ram", "1MiB"]) == 3
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "host_memory" in out


@pytest.mark.parametrize("what", ["batch-size", "seq-len", "host", "disk"])
def test_solve_prints_its_answer(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ram", "48MiB", "-b", "2", "-s", "32", "--solve", what]
    assert main(["estimate", *GPT2, *arguments]) == 0
    out = capsys.readouterr().out
    assert f"solved: {what}" in out
    assert "FITS. GeminiPlugin(" in out


def test_a_gpu_can_be_asked_about_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *GPT2, "--gpu", "32MiB", "--ram", "64MiB", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["tiers"]["device"]["peak_bytes"] <= 32 * MIB
    assert content["tiers"]["device"]["non_model_bytes"] > 0
    assert content["tiers"]["host"]["non_model_bytes"] == 0
    assert "device_memory" in content["arguments"]


def test_models_are_found_by_file_folder_type_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **SIZES}))
    (tmp_path / "my_model.py").write_text(
        "import torch\ndef make(width=8):\n    model = torch.nn.Sequential(torch.nn.Linear(width, 1))\n"
        "    return model, lambda size, length: {'input': torch.zeros(size, width)}\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec in (str(tmp_path), str(tmp_path / "config.json"), "gpt2", "bert"):
        assert find_subject(spec, {}).build
    assert sum(p.numel() for p in find_subject("my_model:make", {"width": 4}).build().parameters()) == 5
    with pytest.raises(TypeError, match=r"must return a torch.nn.Module"):
        find_subject("my_model:wrong", {}).build()
    for missing in ("my_model:nothing", "no_module:x", "no/such/model", str(tmp_path / "my_model.py")):
        with pytest.raises(NotFound):
            find_subject(missing, {})
    assert main(["estimate", "no/such/model"]) == 4
    assert main(["estimate"]) == 2
    assert main(["estimate", "gpt2", "--ram", "much"]) == 2


@pytest.mark.parametrize(
    ("ram", "config", "streams"),
    [(16.1, {}, False), (15.0, {}, True), (14.1, {"split_master": True}, False), (16.1, {"precision": "fp32"}, False)],
)
def test_only_full_copies_that_do_not_stay_are_filled_in_each_step(
    ram: float, config: dict[str, Any], streams: bool
) -> None:
    """Bytes a parameter: 12 of states, a gradient, and a full copy where it is not the master, or half of it."""
    data = ModelData(subject_of(build), GeminiConfig(**config, chunk_numel=1024))
    limits = {Tier.DEVICE: 1, Tier.HOST: round(ram * data.numel), Tier.DISK: 0}
    packing = data.pack(limits, MemoryMap.UNIFIED)
    assert bool(streamed_copies(packing.plans, room_for_copies(packing, limits))) == streams


def test_split_masters_take_less_and_are_among_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {}
    for more in ((), ("--split-master",)):
        assert main(["estimate", *GPT2, "--ram", "1GiB", "--json", *more]) == 0
        content = json.loads(capsys.readouterr().out)
        peaks[more] = content["tiers"]["host"]["model_bytes"] / content["parameters"]
        assert eval(content["arguments"], {"GeminiPlugin": GeminiPlugin}).config.split_master == bool(more)
    assert list(peaks.values()) == pytest.approx([16.0, 14.0], rel=0.01)
    for wrong, reason in (
        (("--optimizer", "SGD"), "--split-master needs HybridAdam or AdamW, got --optimizer SGD"),
        (("--precision", "fp16"), "split_master=True needs precision='bf16'"),
    ):
        assert main(["estimate", *GPT2, "--split-master", *wrong]) == 2
        assert reason in capsys.readouterr().err


def test_bench_measures_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hardware.json"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    small = ("--numel", "65536", "--disk-size", "32MiB")
    assert main(["bench", str(tmp_path), *small, "-o", str(file), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": "#/$defs/bench", "$defs": schema["$defs"]}).validate(content)
    assert set(content["bytes_per_second"]) >= {"host_to_device", "disk_to_host", "host_to_disk", "disk_mixed"}
    assert all(value > 0 for value in content["bytes_per_second"].values())
    assert json.loads(file.read_text())["flops_per_second"] == content["flops_per_second"]
    disk = content["disk"]
    assert disk["file_bytes"] == 32 << 20 and disk["folder"] == str(tmp_path)
    assert all(len(rounds) == 3 for rounds in disk["rounds"].values())
    # The next training on this disk asks it as it was found to be best.
    remembered = json.loads(Path(disk["remembered_in"]).read_text())
    assert (remembered["nbytes"], remembered["depth"]) == (disk["request_bytes"], disk["depth"])
    assert tuned(tmp_path, LEAST_TIER_BYTES, disks_folder()) == Requests(disk["request_bytes"], disk["depth"])
    assert main(["bench", "/proc/no", "--numel", "65536"]) == 2
    assert "/proc/no" in capsys.readouterr().err
    assert main(["bench", str(tmp_path), "--numel", "65536", "--disk-size", "a lot"]) == 2
    assert "--disk-size" in capsys.readouterr().err


def test_an_estimate_has_the_time_of_a_step_once_the_machine_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["estimate", *GPT2, "--ram", "1GiB", "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert before["step_seconds_floor"] is None and any("gemini-stat bench" in text for text in before["remarks"])
    links = {"host_to_device": 1e9, "disk_to_host": 1e6, "host_to_disk": 1e6, "disk_mixed": 1e6}
    speed = {"training_flops_per_second": 1e12, "flops_per_second": 2e12, "adam_elements_per_second": 1e9}
    hardware_file().parent.mkdir(parents=True)
    hardware_file().write_text(json.dumps({"bytes_per_second": links, **speed}))
    assert main(["estimate", *GPT2, "--ram", "1GiB", "--json"]) == 0
    resident = json.loads(capsys.readouterr().out)
    assert resident["step_seconds_floor"] > 0 and "disk" not in resident["step_seconds_floor_by"]
    assert not any("gemini-stat bench" in text for text in resident["remarks"])
    assert main(["estimate", *GPT2, "--ram", "42MiB", "--disk", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert "a step takes" in said and "waiting" in said


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 8:1 / / rw - ext4 /dev/a rw\n"
        f"23 22 0:5 / {tmp_path} rw - xfs /dev/b rw\n"
        f"24 23 0:6 / {tmp_path}/with\\040blank rw shared:1 - tmpfs none rw\n"
    )
    assert file_system(tmp_path / "with blank" / "x", mounts) == "tmpfs"
    assert file_system(tmp_path / "other", mounts) == "xfs"
    assert file_system(Path("/"), mounts) == "ext4"
    assert file_system(tmp_path, tmp_path / "none") == "unknown"


@pytest.mark.parametrize("nbytes", [1025, 64 << 20, (64 << 20) + 1, 215_353_344])
def test_what_must_be_enough_is_written_rounded_up(nbytes: int) -> None:
    assert parse_bytes(as_argument(nbytes).strip('"')) <= nbytes <= parse_bytes(as_argument(nbytes, up=True).strip('"'))
