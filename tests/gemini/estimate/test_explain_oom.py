"""gemini-stat explain-oom: the post-mortem of a run that had too little."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from capped import CHILD, MIB, as_keywords, sets, tried
from loop import SMALL, batch, build
from stat_runs import make_run

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.estimate.recorded import config_of, recorded_groups, skeleton
from gemini.estimate.subject import find_subject
from gemini.nn.optimizer import HybridAdam
from gemini.packing.packing import decide
from gemini.stat.cli import main
from gemini.stat.commands.schema import output_schema
from gemini.stat.console import Exit
from gemini.telemetry.documents import read_chunks
from gemini.telemetry.layout import chunks_file

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 64},
    "llama": {
        "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 64,
    },
}  # fmt: skip


def run_out_of_memory(model: Any, inputs: Any, folder: Path) -> None:
    """A run whose first forward does, or so it says."""
    booster = Booster(plugin=GeminiPlugin(telemetry=folder))
    model, *_ = booster.boost(model, HybridAdam(model.parameters()))

    def fail(module: Any, args: Any) -> None:
        raise MemoryError("made up")

    list(model.modules())[-1].register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory):
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    telemetry = boosted(model).telemetry
    assert telemetry is not None
    telemetry.close()


def train_until_it_breaks(folder: Path, error: BaseException, optimizer: Any = HybridAdam, **plugin: Any) -> Any:
    """A run whose third forward runs out of memory, however much room homes make; and what boost had decided."""
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=folder, **plugin))
    model, optimizer, *_ = booster.boost(model, optimizer(model.parameters()))
    packing = boosted(model).packing
    for number in range(2):
        booster.backward(model(batch(number)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def fail(module: Any, args: Any) -> None:
        raise error

    handle = model[6].register_forward_pre_hook(fail)
    with pytest.raises((type(error), OutOfMemory)):  # the runtime turns errors about memory into ours
        model(batch(2))
    handle.remove()
    state = boosted(model)
    assert state.telemetry is not None
    state.telemetry.close()
    return model, packing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": torch.optim.SGD},
        {"optimizer": partial(torch.optim.RMSprop, momentum=0.9)},
        {"update_in_backward": True, "host_memory": "480KiB"},
        {"split_master": True, "precision": "bf16", "device_memory": "150KiB"},
    ],
)
def test_the_recorded_parameters_pack_as_the_model_did(options: dict[str, Any], tmp_path: Path) -> None:
    small = {"device_memory": "36KiB", "host_memory": "500KiB", "disk_memory": "1MiB", "offload_dir": tmp_path, **SMALL}
    model, expected = train_until_it_breaks(tmp_path / "run", MemoryError(), **{**small, **options})
    chunks = read_chunks(tmp_path / "run", 0)
    assert chunks is not None
    again = skeleton(chunks)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    state = boosted(model)
    groups = recorded_groups(chunks, again)
    config = config_of(chunks)
    assert (config.update_in_backward, config.split_master) == tuple(
        options.get(name, False) for name in ("update_in_backward", "split_master")
    )
    packing = decide(again, groups, config, state.capacities, lambda group: tuple(group["slots"]))
    assert [plan.tiers for plan in packing.plans] == [plan.tiers for plan in expected.plans]
    assert [plan.layout for plan in packing.plans] == [plan.layout for plan in expected.plans]
    found, was = packing.placement, expected.placement
    assert (found.homes, found.nbytes) == (was.homes, was.nbytes)
    # Without the modules' types it is not known which of them run one after the other.
    assert found.gradient_room.keys() == was.gradient_room.keys()
    assert all(found.gradient_room[tier] >= nbytes for tier, nbytes in was.gradient_room.items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 0.03 MiB. GPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 30000 bytes."),
    ],
)
def test_changes_are_checked_by_the_packing(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_until_it_breaks(tmp_path / "run", error, host_memory="1MiB", **SMALL)
    assert main(["explain-oom", str(tmp_path / "run"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    schema = output_schema()
    jsonschema.Draft202012Validator({"$ref": "#/$defs/explain_oom", "$defs": schema["$defs"]}).validate(content)
    assert content["unit"] == "6"
    assert content["phase"] == "forward"
    assert 1 <= len(content["changes"]) <= 3
    assert any(change["verified"] for change in content["changes"])
    assert main(["explain-oom", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "what would have helped" in out
    assert "optimizer states" in out


def test_a_verified_change_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first change asks for more: given it, boost and training work."""
    error = torch.OutOfMemoryError("device tier out of memory. Chunk 3 needs 0.1 MiB; set device_memory to 80000 bytes")
    train_until_it_breaks(tmp_path / "run", error, device_memory="36KiB", **SMALL)
    main(["explain-oom", str(tmp_path / "run"), "--json"])
    changes = json.loads(capsys.readouterr().out)["changes"]
    checked = [change for change in changes if change["verified"]]
    assert checked
    for change in checked:
        arguments = change["arguments"].replace("offload_dir=...", f"offload_dir={str(tmp_path)!r}")
        plugin = eval(f"dict({arguments})")
        model = build()
        booster = Booster(plugin=GeminiPlugin(telemetry=False, **{"device_memory": "36KiB", **SMALL, **plugin}))
        model, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
        booster.backward(model(batch(0)).float().square().mean(), optimizer)
        optimizer.step()


def test_both_halves_of_split_masters_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {}
    for split in (False, True):
        model, _ = train_until_it_breaks(tmp_path / str(split), MemoryError(), split_master=split, **SMALL)
        assert main(["explain-oom", str(tmp_path / str(split)), "--json"]) == 0
        holders = json.loads(capsys.readouterr().out)["holders"]
        held[split] = {item["what"]: item["bytes"] for item in holders}
    padded = sum(chunk.layout.numel for chunk in boosted(model).manager.chunks)
    assert held[True]["masters and frozen parameters"] == held[False]["masters and frozen parameters"] == 4 * padded
    assert "full copies (in RAM)" in held[False] and "full copies (in RAM)" not in held[True]


def test_a_run_that_goes_on_is_explained_at_its_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-oom", str(make_run())]) == 0
    assert "the present peak" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_recorded_model_of_transformers_is_estimated(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = find_subject(kind, TINY[kind]).build()
    run_out_of_memory(model, {"input_ids": torch.zeros(3, 40, dtype=torch.long)}, tmp_path / "run")
    assert main(["explain-oom", str(tmp_path / "run"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["not_estimated"] is None
    assert [change["verified_by"] for change in content["changes"]] == ["estimate"] * 3
    # There was enough after all: the error was made up.
    assert content["changes"][0]["batch_size"] is None
    assert {change["checkpointing"] for change in content["changes"]} == {None, True}
    assert {change["batch_size"] for change in content["changes"]} == {None, 2}


def test_what_a_record_claims_of_a_model_is_not_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = find_subject("gpt2", TINY["gpt2"]).build()
    run_out_of_memory(model, {"input_ids": torch.zeros(3, 40, dtype=torch.long)}, tmp_path / "run")
    file = chunks_file(tmp_path / "run", 0)
    content = json.loads(file.read_text())
    for claim in (
        {"class": "GPT2LMHeadModel", "config": {"model_type": "gpt2", "n_layer": 10**9}},
        {"class": "Trainer", "config": {"model_type": "gpt2"}},
        {"class": "GPT2LMHeadModel", "config": {"model_type": "../../x"}},
        {"class": ["GPT2LMHeadModel"], "config": {"model_type": "gpt2", "n_embd": -1}},
        {"class": "GPT2LMHeadModel", "config": []},
    ):
        file.write_text(json.dumps({**content, "model": claim}))
        assert main(["explain-oom", str(tmp_path / "run"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["not_estimated"]
        assert "estimate" not in {change["verified_by"] for change in found["changes"]}


def test_another_model_than_the_one_that_ran_out_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run_out_of_memory(build(), batch(0), tmp_path / "run")
    assert main(["explain-oom", str(tmp_path / "run"), "--model", "small_gpt:gpt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "parameters, and the run's model had" in found["not_estimated"]
    assert main(["explain-oom", str(tmp_path / "run"), "--model", "no_module:gpt"]) == Exit.NO_RUN


def test_an_unknown_model_says_how_to_have_it_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_out_of_memory(build(), batch(0), tmp_path / "run")
    assert main(["explain-oom", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "--model MODEL" in out
    assert "not verified" in out
    assert "verified: the estimate" not in out


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("spec", "batch_size", "length", "ram", "plugin"),
    [
        ("small_gpt:gpt", 160, 128, 256, {}),
        ("small_gpt:wide", 14, 128, 232, {"host_memory": "216MiB"}),
        ("gpt2", 4, 256, 480, {"host_memory": "320MiB"}),
    ],
    ids=["activations", "model data", "recorded"],
)
def test_a_run_that_ran_out_trains_with_each_change(
    spec: str,
    batch_size: int,
    length: int,
    ram: int,
    plugin: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(CHILD.parent))
    at = {"batch": batch_size, "length": length, "cap_bytes": ram * MIB}
    (ran,) = tried(spec, "fp32", {**at, "plugin": {**plugin, "telemetry": str(tmp_path / "run")}})
    assert ran["error"] == "OutOfMemory"
    named = ["--model", spec, *sets(spec)] if ":" in spec else []
    assert main(["explain-oom", str(tmp_path / "run"), *named, "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert [change["verified_by"] for change in changes] == ["estimate"] * 3
    trials = [
        {
            "batch": change["batch_size"] or batch_size,
            "length": change["seq_len"] or length,
            "checkpointing": change["checkpointing"],
            "cap_bytes": (change["ram_bytes"] or ram * MIB),
            "plugin": as_keywords(change["arguments"], tmp_path / "disk"),
        }
        for change in changes
    ]
    results = tried(spec, "fp32", *trials)
    for change, result in zip(changes, results, strict=True):
        print(f"\n{spec}: {change['text']}: {result['error'] or 'trains'}")
    assert [result["error"] for result in results] == [None] * 3
