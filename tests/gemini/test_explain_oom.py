"""gemini-stat explain-oom: the post-mortem of a run that had too little."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from loop import SMALL, batch, build
from stat_runs import make_run

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.errors import OutOfMemory
from gemini.estimate.explain import recorded_groups, skeleton
from gemini.nn.optimizer import HybridAdam
from gemini.packing.packing import decide
from gemini.stat.cli import main
from gemini.telemetry.documents import read_chunks
from gemini.telemetry.schema import load_schema


def train_until_it_breaks(folder: Path, error: BaseException, optimizer: Any = HybridAdam, **plugin: Any) -> Any:
    """A run whose third forward runs out of memory."""
    model = build()
    booster = Booster(plugin=GeminiPlugin(telemetry=folder, **plugin))
    model, optimizer, *_ = booster.boost(model, optimizer(model.parameters()))
    for number in range(2):
        booster.backward(model(batch(number)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def fail(module: Any, args: Any) -> None:
        raise error

    handle = model[6].register_forward_pre_hook(fail)
    with pytest.raises((type(error), OutOfMemory)):  # the runtime turns what is for want of memory into ours
        model(batch(2))
    handle.remove()
    state = boosted(model)
    assert state.telemetry is not None
    state.telemetry.close()
    return model


@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": torch.optim.SGD}, {"optimizer": partial(torch.optim.RMSprop, momentum=0.9)}]
)
def test_the_recorded_parameters_pack_as_the_model_did(optimizer: dict[str, Any], tmp_path: Path) -> None:
    small = {"device_memory": "36KiB", "host_memory": "500KiB", "disk_memory": "1MiB", "offload_dir": tmp_path, **SMALL}
    model = train_until_it_breaks(tmp_path / "run", MemoryError(), **optimizer, **small)
    chunks = read_chunks(tmp_path / "run", 0)
    assert chunks is not None
    again = skeleton(chunks)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    state = boosted(model)
    groups = recorded_groups(chunks, again)
    packing = decide(again, groups, state.config, state.capacities, lambda group: tuple(group["slots"]))
    assert [plan.layout for plan in packing.plans] == [plan.layout for plan in state.packing.plans]
    assert packing.placement == state.packing.placement


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 30000 bytes."),
    ],
)
def test_changes_are_checked_by_the_packing(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_until_it_breaks(tmp_path / "run", error, host_memory="1MiB", **SMALL)
    assert main(["explain-oom", str(tmp_path / "run"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    schema = load_schema("output")
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


def test_a_run_that_goes_on_is_explained_at_its_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain-oom", str(make_run())]) == 0
    assert "the present peak" in capsys.readouterr().out
