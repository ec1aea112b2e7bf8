"""The answers of ``estimate --solve`` against training under RLIMIT_DATA: it runs at the answer and not at 1.2 times.

The cap is what the command was told there is, beyond what a warm process of a small training takes. What memory it
says is enough is divided by 1.2 instead.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from capped import CHILD, MIB, as_keywords, sets, tried

from gemini.sizes import parse_bytes
from gemini.stat.cli import main

RAM_BESIDE_DISK = {("gpt2", "fp32"): 560, ("gpt2", "bf16"): 400, ("llama", "fp32"): 400, ("llama", "bf16"): 320}
"""MiB: a sixth less than enough without a disk."""


def estimated(capsys: pytest.CaptureFixture[str], spec: str, *arguments: str) -> dict[str, Any]:
    assert main(["estimate", spec, *sets(spec), *arguments, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def more(value: int) -> int:
    return -(-value * 6 // 5)


def check(results: list[Any]) -> None:
    at, beyond = results
    assert at["error"] is None, at
    assert beyond["error"] is not None, "there was room for 1.2 times the answer"


def solve_and_try(
    capsys: pytest.CaptureFixture[str],
    spec: str,
    precision: str,
    what: str,
    ram: int,
    *flags: str,
) -> None:
    content = estimated(capsys, spec, "--precision", precision, "--ram", str(ram), *flags, "--solve", what)
    answer, plugin = content["solved"]["value"], as_keywords(content["arguments"])
    field = {"batch-size": "batch", "seq-len": "length"}[what]
    at = {"batch": content["batch_size"], "length": content["seq_len"], "cap_bytes": ram, "plugin": plugin}
    assert at[field] == answer
    results = tried(spec, precision, at, {**at, field: more(answer)})
    ended = results[1]["error"]
    print(f"\n{spec} {precision} {what} in {ram >> 20} MiB: {answer} trains, {more(answer)} ends with {ended}")
    check(results)


def test_the_largest_batch_trains_and_a_larger_one_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(CHILD.parent))
    solve_and_try(capsys, "small_gpt:gpt", "fp32", "batch-size", 256 * MIB, "-s", "128")


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["gpt2", "llama"])
@pytest.mark.parametrize("what", ["batch-size", "seq-len"])
def test_the_largest_trains_and_a_fifth_more_does_not(
    what: str, spec: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-s", "256") if what == "batch-size" else ("-b", "4")
    solve_and_try(capsys, spec, precision, what, 1280 * MIB, *flags)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["gpt2", "llama"])
def test_the_least_ram_is_enough_and_less_is_not(spec: str, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--precision", precision, "-b", "4", "-s", "256")
    content = estimated(capsys, spec, *arguments, "--ram", "16GiB", "--solve", "host")
    ram, plugin = content["solved"]["value"], as_keywords(content["arguments"])
    at = {"batch": 4, "length": 256, "cap_bytes": ram, "plugin": plugin}
    # The user who has less says so; and one who claims to have as much is refused by the system.
    less = parse_bytes(plugin["host_memory"]) - (ram - ram * 5 // 6)
    trials = at, {**at, "plugin": {"host_memory": less}}, {**at, "cap_bytes": ram * 5 // 6}
    enough, said, refused = tried(spec, precision, *trials)
    print(f"\n{spec} {precision} host: {ram >> 20} MiB are enough, less is {said['error']} or {refused['error']}")
    check([enough, said])
    check([enough, refused])


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spec", ["gpt2", "llama"])
def test_the_least_disk_is_enough_and_less_is_not(
    spec: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ram = RAM_BESIDE_DISK[spec, precision] * MIB
    arguments = ("--precision", precision, "-b", "4", "-s", "256", "--ram", str(ram))
    content = estimated(capsys, spec, *arguments, "--solve", "disk")
    disk, plugin = content["solved"]["value"], as_keywords(content["arguments"], tmp_path)
    at = {"batch": 4, "length": 256, "cap_bytes": ram, "plugin": plugin}
    less = {**plugin, "disk_memory": disk * 5 // 6}
    results = tried(
        spec, precision, at, {**at, "plugin": less},
        warm_plugin={"host_memory": "8MiB", "disk_memory": "64MiB", "offload_dir": str(tmp_path)},
    )  # fmt: skip
    print(
        f"\n{spec} {precision} disk: {disk >> 20} MiB are enough in {ram >> 20} MiB of RAM, "
        f"less is {results[1]['error']}"
    )
    check(results)
