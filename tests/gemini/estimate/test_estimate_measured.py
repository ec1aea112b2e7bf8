"""Estimates against training in a child process, for five architectures. Minutes long."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemini.stat.cli import main

MIB = 1 << 20
CHILD = Path(__file__).with_name("child_measured.py")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 5, "n_embd": 384, "n_head": 6, "vocab_size": 6000},
    "llama": {
        "num_hidden_layers": 5, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1024,
        "vocab_size": 6000,
    },
    "bert": {
        "num_hidden_layers": 5, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536,
        "vocab_size": 6000,
    },
    "t5": {"num_layers": 4, "d_model": 384, "d_kv": 64, "num_heads": 6, "d_ff": 1536, "vocab_size": 6000},
    "mixtral": {
        "num_hidden_layers": 5, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
        "intermediate_size": 512, "vocab_size": 6000, "num_local_experts": 4,
    },
}  # fmt: skip


def measured(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(CHILD), *map(str, arguments)],
        env={name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")},
        capture_output=True,
        text=True,
        timeout=280,
    )


def estimated(capsys: pytest.CaptureFixture[str], spec: str, fields: dict[str, Any], *arguments: str) -> dict[str, Any]:
    sets = [text for name, value in fields.items() for text in ("--set", f"{name}={value}")]
    code = main(["estimate", spec, *sets, *arguments, "--json"])
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if content["fits"] else 3), content
    return content


@pytest.mark.heavy
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("spec", SIZES)
def test_the_peak_is_within_five_per_cent(
    spec: str, batch: int, checkpointing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpointing"] if checkpointing else []
    begin = time.perf_counter()
    content = estimated(capsys, spec, SIZES[spec], "-b", str(batch), "-s", "256", "--ram", "16GiB", *flags)
    seconds = time.perf_counter() - begin
    done = measured(spec, json.dumps(SIZES[spec]), batch, 256, int(checkpointing), "bf16")
    assert done.returncode == 0, done.stderr[-2000:]
    stats = json.loads(done.stdout.splitlines()[-1])
    host, non_model = content["tiers"]["host"], stats["non_model/peak_bytes"]
    measured_peak = stats["host/peak_bytes"] + non_model
    off = host["peak_bytes"] / measured_peak - 1
    print(
        f"\n| {spec} | {batch} | {'yes' if checkpointing else 'no'} | {host['peak_bytes'] / MIB:.0f} | "
        f"{measured_peak / MIB:.0f} | {off:+.1%} | {content['non_model_bytes'] / non_model - 1:+.1%} | {seconds:.1f} |"
    )
    assert host["model_bytes"] == stats["host/peak_bytes"]
    assert abs(off) <= 0.05


@pytest.mark.heavy
@pytest.mark.parametrize("spec", SIZES)
def test_the_peak_of_each_tier_is_within_five_per_cent(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An emulated device with room for some of the full copies, RAM for half of the homes, disk for the rest."""
    shape = ("-b", "4", "-s", "256")
    roomy = estimated(capsys, spec, SIZES[spec], *shape, "--ram", "16GiB")
    device = roomy["non_model_bytes"] * 21 // 20 + 24 * MIB
    ram = roomy["parameters"] * 7 + 24 * MIB
    content = estimated(
        capsys, spec, SIZES[spec], *shape, "--gpu", str(device), "--ram", str(ram), "--disk", "2GiB"
    )  # fmt: skip
    plugin = eval(content["arguments"].replace("GeminiPlugin", "dict"))
    plugin["offload_dir"] = str(tmp_path)
    done = measured(spec, json.dumps(SIZES[spec]), 4, 256, 0, plugin.pop("precision"), json.dumps(plugin))
    assert done.returncode == 0, done.stderr[-2000:]
    stats = json.loads(done.stdout.splitlines()[-1])
    took = {tier: stats[f"{tier}/peak_bytes"] for tier in ("device", "host", "disk")}
    took["device"] += stats["non_model/peak_bytes"]
    off = {tier: content["tiers"][tier]["peak_bytes"] / nbytes - 1 for tier, nbytes in took.items()}
    cells = [f"{content['tiers'][t]['peak_bytes'] / MIB:.0f} / {took[t] / MIB:.0f} ({off[t]:+.1%})" for t in took]
    print(f"\n| {spec} | {' | '.join(cells)} |")
    assert all(took.values())
    assert all(abs(value) <= 0.05 for value in off.values())
