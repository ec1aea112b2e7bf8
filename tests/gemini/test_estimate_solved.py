"""The answers of ``estimate --solve`` against training under RLIMIT_DATA: it runs at the answer and not at 1.2 times.

The cap is what the command was told there is, beyond what a warm process of a small training takes. What memory it
says is enough is divided by 1.2 instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemini.sizes import parse_bytes
from gemini.stat.cli import main

CHILD = Path(__file__).with_name("child_solved.py")
MIB = 1 << 20
GPT2 = {"n_layer": 5, "n_embd": 384, "n_head": 6, "vocab_size": 6000, "n_positions": 4096}
LLAMA = {
    "num_hidden_layers": 5, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6,
    "intermediate_size": 1024, "vocab_size": 6000, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL_GPT2 = {"n_layer": 3, "n_embd": 128, "n_head": 4, "vocab_size": 512}
WARM: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 64, "n_head": 2},
    "llama": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
}


def estimated(capsys: pytest.CaptureFixture[str], spec: str, fields: dict[str, Any], *arguments: str) -> dict[str, Any]:
    sets = [text for name, value in fields.items() for text in ("--set", f"{name}={value}")]
    assert main(["estimate", spec, *sets, *arguments, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def tried(spec: str, fields: dict[str, Any], precision: str, *trials: dict[str, Any], **more: Any) -> list[Any]:
    """What became of each trial, in one child."""
    asked = {"spec": spec, "fields": fields, "warm": WARM[spec], "precision": precision, "trials": trials, **more}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(asked)], capture_output=True, text=True, timeout=280, env=clean
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def plugin_of(content: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """The arguments that the command says to paste, as they are, but for the precision and the folder."""
    keywords: dict[str, Any] = eval(content["arguments"].replace("GeminiPlugin", "dict"))
    keywords.pop("precision")
    if folder is not None:
        keywords["offload_dir"] = str(folder)
    return keywords


def more(value: int) -> int:
    return -(-value * 6 // 5)


def check(results: list[Any]) -> None:
    at, beyond = results
    assert at["error"] is None, at
    assert beyond["error"] is not None, "there was room for 1.2 times the answer"


def solve_and_try(
    capsys: pytest.CaptureFixture[str],
    spec: str,
    fields: dict[str, Any],
    precision: str,
    what: str,
    ram: int,
    *flags: str,
) -> None:
    content = estimated(capsys, spec, fields, "--precision", precision, "--ram", str(ram), *flags, "--solve", what)
    answer, plugin = content["solved"]["value"], plugin_of(content)
    field = {"batch-size": "batch", "seq-len": "length"}[what]
    at = {"batch": content["batch_size"], "length": content["seq_len"], "cap_bytes": ram, "plugin": plugin}
    assert at[field] == answer
    results = tried(spec, fields, precision, at, {**at, field: more(answer)})
    ended = results[1]["error"]
    print(f"\n{spec} {precision} {what} in {ram >> 20} MiB: {answer} trains, {more(answer)} ends with {ended}")
    check(results)


def test_the_largest_batch_trains_and_a_larger_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    solve_and_try(capsys, "gpt2", SMALL_GPT2, "fp32", "batch-size", 256 * MIB, "-s", "128")


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("spec", "fields"), [("gpt2", GPT2), ("llama", LLAMA)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("what", ["batch-size", "seq-len"])
def test_the_largest_trains_and_a_fifth_more_does_not(
    what: str, spec: str, fields: dict[str, Any], precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-s", "256") if what == "batch-size" else ("-b", "4")
    solve_and_try(capsys, spec, fields, precision, what, 1280 * MIB, *flags)


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_least_ram_is_enough_and_less_is_not(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--precision", precision, "-b", "4", "-s", "256")
    content = estimated(capsys, "gpt2", GPT2, *arguments, "--ram", "16GiB", "--solve", "host")
    ram, plugin = content["solved"]["value"], plugin_of(content)
    at = {"batch": 4, "length": 256, "cap_bytes": ram, "plugin": plugin}
    # The user who has less says so; and one who claims to have as much is refused by the system.
    less = parse_bytes(plugin["host_memory"]) - (ram - ram * 5 // 6)
    trials = at, {**at, "plugin": {"host_memory": less}}, {**at, "cap_bytes": ram * 5 // 6}
    enough, said, refused = tried("gpt2", GPT2, precision, *trials)
    print(f"\n{precision} host: {ram >> 20} MiB are enough, less is {said['error']} or {refused['error']}")
    check([enough, said])
    check([enough, refused])


@pytest.mark.heavy
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_least_disk_is_enough_and_less_is_not(
    precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ram = {"fp32": 560, "bf16": 400}[precision] * MIB
    arguments = ("--precision", precision, "-b", "4", "-s", "256", "--ram", str(ram))
    content = estimated(capsys, "gpt2", GPT2, *arguments, "--solve", "disk")
    disk, plugin = content["solved"]["value"], plugin_of(content, tmp_path)
    at = {"batch": 4, "length": 256, "cap_bytes": ram, "plugin": plugin}
    less = {**plugin, "disk_memory": disk * 5 // 6}
    results = tried(
        "gpt2", GPT2, precision, at, {**at, "plugin": less},
        warm_plugin={"host_memory": "8MiB", "disk_memory": "64MiB", "offload_dir": str(tmp_path)},
    )  # fmt: skip
    print(f"\n{precision} disk: {disk >> 20} MiB are enough in {ram >> 20} MiB of RAM, less is {results[1]['error']}")
    check(results)
