"""Trainings in a child under RLIMIT_DATA, and what became of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "gemini" / "estimate" / "child_solved.py"
MIB = 1 << 20
FIELDS: dict[str, dict[str, Any]] = {
    "small_gpt:gpt": {"layers": 4},
    "small_gpt:wide": {"layers": 6},
    "gpt2": {"n_layer": 5, "n_embd": 384, "n_head": 6, "vocab_size": 6000, "n_positions": 4096},
    "llama": {
        "num_hidden_layers": 5, "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6,
        "intermediate_size": 1024, "vocab_size": 6000, "max_position_embeddings": 4096,
    },
}  # fmt: skip
WARM: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 64, "n_head": 2},
    "small_gpt:gpt": {"layers": 1},
    "small_gpt:wide": {"layers": 1},
    "llama": {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
}


def sets(spec: str) -> list[str]:
    """As arguments of ``gemini-stat``."""
    return [text for name, value in FIELDS[spec].items() for text in ("--set", f"{name}={value}")]


def tried(spec: str, precision: str, *trials: dict[str, Any], **more: Any) -> list[Any]:
    """What became of each trial, in one child."""
    asked = {"spec": spec, "fields": FIELDS[spec], "warm": WARM[spec], "precision": precision, "trials": trials, **more}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(asked)], capture_output=True, text=True, timeout=600, env=clean
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def as_keywords(arguments: str, folder: Path | None = None) -> dict[str, Any]:
    """The arguments that the command says to paste, as they are, but for the precision and the folder."""
    keywords: dict[str, Any] = eval(arguments.replace("GeminiPlugin", "dict"))
    keywords.pop("precision")
    if folder is not None and "offload_dir" in keywords:
        keywords["offload_dir"] = str(folder)
    return keywords
