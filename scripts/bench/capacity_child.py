"""One training of a GPT under a cap on RAM; `capacity.py` starts it, and reads the last line that it prints.

    python capacity_child.py '{"kind": "managed", "cap": 4294967296, "layers": 24, "hidden": 2048, ...}'

The cap (``RLIMIT_DATA``) is set before anything is imported.
"""

import json
import resource
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

RATE, WEIGHT_DECAY = 1e-4, 0.01
"""The latter as torch's AdamW has it."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    if asked["cap"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["cap"],) * 2)
    import torch

    from gemini.train.model import GPTConfig

    torch.manual_seed(0)
    hidden = asked["hidden"]
    config = GPTConfig(layers=asked["layers"], hidden=hidden, heads=max(1, hidden // 64), seq_len=asked["seq_len"])
    generator = torch.Generator().manual_seed(1)
    size = (asked["batch_size"], asked["seq_len"])
    batches = [torch.randint(0, 256, size, generator=generator) for _ in range(asked["steps"] + 1)]
    trained = plain(config, batches) if asked["kind"] == "plain" else managed(config, batches, asked)
    print(json.dumps({"parameters": config.parameter_count(), **trained}))


def plain(config: Any, batches: list[Any]) -> dict[str, Any]:
    """bf16 with fp32 masters."""
    from plain_masters import Masters

    from gemini.train.model import GPT2LMHeadModel

    model = GPT2LMHeadModel(config)
    masters, losses = Masters(model, RATE), []
    for batch in batches:
        loss = model(batch, batch)
        loss.backward()
        masters.update()
        losses.append(float(loss.detach()))
    return {"losses": losses}


def managed(config: Any, batches: list[Any], asked: dict[str, Any]) -> dict[str, Any]:
    """Ours, lazily initialised, with nothing but ``offload_dir``."""
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel

    begin = time.perf_counter()
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(config)
    optimizer: Any = HybridAdam(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    more = {"disk_memory": asked["disk_bytes"]} if asked.get("disk_bytes") else {}
    with tempfile.TemporaryDirectory(dir=asked["folder"]) as folder:
        plugin = GeminiPlugin(offload_dir=folder, update_in_backward=asked.get("update_in_backward", False), **more)
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, optimizer)
        boost_seconds = time.perf_counter() - begin
        losses, ends, moved = [], [], []
        for batch in batches:
            loss = model(batch, batch)
            booster.backward(loss, optimizer)
            losses.append(float(loss.detach()))
            # From the end of a backward to the end of the next: an update, a forward and a backward, with their I/O.
            stats = model.memory_stats()
            ends.append(time.perf_counter())
            moved.append((stats["move/disk_read_bytes"], stats["move/disk_write_bytes"]))
            optimizer.step()
            optimizer.zero_grad()
        list(model.named_parameters())  # waits for the last updates
        after = model.memory_stats()
    return {
        "losses": losses,
        "boost_seconds": boost_seconds,
        "step_seconds": [later - earlier for earlier, later in pairwise(ends)],
        "read_bytes": (moved[-1][0] - moved[0][0]) / (len(moved) - 1),
        "written_bytes": (moved[-1][1] - moved[0][1]) / (len(moved) - 1),
        "gradient_bytes": after["model_data/gradient_bytes"],
        "disk_used": after["disk/used_bytes"],
        "host_capacity": after["host/capacity_bytes"],
    }


if __name__ == "__main__":
    main()
