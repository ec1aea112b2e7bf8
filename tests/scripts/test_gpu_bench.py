"""`scripts/gpu` in a form that takes seconds: each part answers, and where one fails the others go on."""

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
TINY = {"tokens": [16], "length": 16, "numel": 1 << 10, "copy_bytes": 1 << 12, "vocabulary": 64}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of the folder, by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def asked(part: str, device: str = "cpu", **more: Any) -> dict[str, Any]:
    return {"part": part, "device": device, "reduced": True, "settings": TINY, **more}


def test_each_part_answers_on_a_cpu(bench: Any, tmp_path: Path) -> None:
    answers: Callable[[dict[str, Any]], Any] = bench("gpu_part").answers
    told = list(answers(asked("bandwidth")))
    assert told[0] == {"device": "cpu"} and {each["what"] for each in told[1:]} >= {"copy on the device"}
    assert all(each["gb_per_second"] > 0 for each in told[1:])
    losses = {}
    for placement in ("resident", "streamed"):
        built, step = answers(asked("step", placement=placement))
        assert built["parameters"] > 0 and step["tokens"] == 16 and step["seconds"] > 0
        losses[placement] = step["losses"]
    assert losses["resident"] == losses["streamed"] and len(set(losses["resident"])) > 1
    (largest,) = answers(asked("largest", layers=1))
    assert largest["layers"] == 1 and largest["seconds"] > 0
    (trace,) = answers(asked("trace", file=str(tmp_path / "trace.json")))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] and trace["moves_beside_kernels"] is None


@pytest.mark.heavy  # tests/sim trains on that device by default, and the parts of the benchmark run on a CPU above
def test_a_streamed_step_and_the_link_on_the_simulated_device(bench: Any, tmp_path: Path) -> None:
    run_part = bench("part_process").run_part
    worker = str(BENCH / "gpu_part.py")
    command = [sys.executable, worker, json.dumps(asked("step", "sim", placement="streamed"))]
    found = run_part(command, tmp_path / "log", 120)
    if "needs a C++ compiler" in found[-1].get("error", ""):
        pytest.skip(found[-1]["error"])
    assert [sorted(each)[0] for each in found] == ["build_seconds", "device/used_bytes"], found
    assert found[-1]["device_peak_bytes"] > 0


def test_what_a_part_told_before_it_failed_or_took_too_long_is_kept(bench: Any, tmp_path: Path) -> None:
    run_part = bench("part_process").run_part
    says = "import sys; print('{\"tokens\": 1}', flush=True); "
    (kept, error) = run_part([sys.executable, "-c", says + "sys.exit('no room')"], tmp_path / "log", 60)
    assert kept == {"tokens": 1} and error == {"error": "ended with 1: no room"}
    (kept, error) = run_part([sys.executable, "-c", says + "import threading; threading.Event().wait()"],
                             tmp_path / "log", 1)  # fmt: skip
    assert kept == {"tokens": 1} and error == {"error": "took longer than 1 s"}


def test_parts_that_fail_are_told_and_the_others_go_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("gpu")

    def part(command: list[Any], log: Path, seconds: float) -> list[dict[str, Any]]:
        which = json.loads(command[-1])
        if which.get("placement") == "host":
            return [{"error": "OutOfMemory: no room\nat all"}]
        return [{"device": "cpu"}] if which["part"] == "bandwidth" else [_step(16)]

    monkeypatch.setattr(module, "run_part", part)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    options = parser.parse_args(["--reduced", "--out", str(tmp_path), "--only", "bandwidth", "step"])
    found = module.run(options)
    assert found["failed"] == ["small, host"] and list(found["parts"]) == [
        "bandwidth", "small, resident", "small, host", "small, streamed"
    ]  # fmt: skip
    rows = {row["what"]: row for row in found["table"]}
    assert (
        rows["small, host"]["more"] == "OutOfMemory: no room" and rows["small, streamed, 16 tokens"]["value"] == "2 ms"
    )
    assert json.loads((tmp_path / "gpu.json").read_text())["table"] == found["table"]
    assert (tmp_path / "gpu.md").read_text().startswith("| what | value | more |\n| --- | --- | --- |\n")
    options.minutes = 0.01  # less than a part needs
    assert all(row["more"] == "no time was left" for row in module.run(options)["table"])


def _step(tokens: int) -> dict[str, Any]:
    return {"tokens": tokens, "seconds": 0.002, "tokens_per_second": 8000.0, "tflops": 0.1, "losses": [1.0]}


@pytest.mark.parametrize("fit", [0, 1, 5, 8, 100])
def test_the_largest_model_is_found_by_halves(bench: Any, fit: int) -> None:
    module, tried = bench("gpu"), []
    settings = argparse.Namespace(most_layers=9)

    def trial(layers: int) -> Callable[[float], list[dict[str, Any]]]:
        tried.append(layers)
        answer = {"layers": layers, "parameters": 1, **_step(16)} if layers <= fit else {"error": "no room"}
        return lambda seconds: [answer]

    (found,) = module._largest(settings, trial, 60.0)
    assert found.get("layers", 0) == min(fit, 9) and len(set(tried)) == len(tried) <= 7


def test_the_share_of_moves_beside_kernels(bench: Any) -> None:
    share = bench("gpu_trace").share_beside
    assert share([(0, 10)], [(5, 20)]) == 0.5
    assert share([(0, 4), (2, 10), (20, 30)], [(0, 1), (1, 5), (25, 26), (28, 40)]) == 8 / 20
    assert share([], [(0, 1)]) is None and share([(0, 1)], []) == 0


def test_all_benchmarks_that_are_named_have_one_form(bench: Any) -> None:
    text = (BENCH / "__main__.py").read_text()
    found = re.findall(r"^ {4}python scripts/bench (\w+(?: \| \w+)*)", text, re.MULTILINE)
    names = [name for line in found for name in line.split(" | ")]
    wanted = "adam lazy overhead capacity offload_step activations checkpoint ranks lora gpu"
    assert names[:10] == wanted.split() and len(set(names)) == len(names)
    for name in names:
        source = (BENCH / f"{name}.py").read_text()
        for part in ("def add_arguments(", "\ndef run(", '"table"'):
            assert part in source, f"{name} has no {part}"


def test_a_record_has_one_row_of_the_table_a_line(bench: Any, tmp_path: Path) -> None:
    record = bench("record")
    table = [{"run": "ours", "ms": "1"}, {"run": "plain", "ms": "2"}]
    record.write(
        {"benchmark": "step", "machine": bench("report").machine(), "table": table}, tmp_path / "a" / "step.json"
    )
    text = (tmp_path / "a" / "step.json").read_text()
    assert '\n  {"run": "plain", "ms": "2"}\n' in text
    found = json.loads(text)
    assert found["table"] == table and {"date", "cpu", "commit", "versions"} <= set(found["machine"])


@pytest.mark.heavy
@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_the_whole_in_small(bench: Any, tmp_path: Path, device: str) -> None:
    run_process = bench("part_process").run_process
    command = [sys.executable, str(BENCH), "gpu", "--reduced", "--device", device, "--out", str(tmp_path / "out")]
    _, ended = run_process(command, tmp_path / "log", 120)
    assert ended is None
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["failed"] == [] and sum(found["part_seconds"].values()) < 60
    assert {"tests", "bandwidth", "trace", "small, streamed", "largest"} <= set(found["parts"])
