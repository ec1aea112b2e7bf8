"""Boosting a lazily initialised model needs little more RAM than the chunks that stay there."""

import tempfile
from typing import Any

import child
from child import run_child
from outcome import Check, Report, Scenario, Settings

from gemini.sizes import format_bytes

_FULL = {"layers": 21, "hidden": 1280, "heads": 20, "seq_len": 256, "host_bytes": 1 << 30}
_SMALL = {"layers": 8, "hidden": 512, "heads": 8, "seq_len": 64, "host_bytes": 128 << 20}
_SLACK_BYTES = 200 * 10**6
_TIMEOUT_SECONDS = 300.0


def run(settings: Settings) -> Report:
    ended = run_child("lazy_boost_peak", _SMALL if settings.small else _FULL, timeout_seconds=_TIMEOUT_SECONDS)
    if ended.result is None:
        return Report.failed(SCENARIO.name, f"died with {ended.returncode}: {ended.errors.strip()[-300:]}")
    facts = ended.result
    limit = facts["host_used_bytes"] + facts["largest_parameter_bytes"] + _SLACK_BYTES
    if settings.headroom_ratio is not None:
        limit = int(settings.headroom_ratio * facts["host_used_bytes"])
    model = f"{facts['parameters'] / 1e6:.0f} M parameters, {format_bytes(facts['model_data_bytes'])} of model data"
    return Report(
        name=SCENARIO.name,
        checks=(
            Check(
                f"resident set's growth, {model}",
                f"at most {format_bytes(limit)}: {format_bytes(facts['host_used_bytes'])} in RAM, the largest "
                f"parameter, {format_bytes(_SLACK_BYTES)}",
                format_bytes(ended.rss_growth_bytes),
                ended.rss_growth_bytes <= limit,
            ),
            Check("chunks on disk", "some", format_bytes(facts["disk_used_bytes"]), facts["disk_used_bytes"] > 0),
        ),
        facts={**facts, "rss_growth_bytes": ended.rss_growth_bytes, "base_rss_bytes": ended.base_rss_bytes},
        peaks={"peak resident set": ended.rss_growth_bytes},
    )


SCENARIO = Scenario(
    name="lazy_boost_peak",
    summary="a 400 M model is made and boosted with little more RAM than its chunks in RAM take",
    quick=False,
    run=run,
)


# -- the child


def _boost(asked: dict[str, Any], folder: str) -> dict[str, Any]:
    import time

    import torch

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel, GPTConfig

    begin = time.monotonic()
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(
            GPTConfig(**{name: asked[name] for name in ("layers", "hidden", "heads", "seq_len")})
        )
    largest = max(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters())
    optimizer: Any = HybridAdam(model.parameters())
    plugin = GeminiPlugin(host_memory=asked["host_bytes"], offload_dir=folder, telemetry=False)
    model, optimizer, *_ = Booster(plugin=plugin).boost(model, optimizer)
    stats = model.memory_stats()
    return {
        "parameters": count,
        "largest_parameter_bytes": largest * 4,
        "model_data_bytes": int(stats["model_data/total_bytes"]),
        "host_used_bytes": int(stats["host/used_bytes"]),
        "disk_used_bytes": int(stats["disk/used_bytes"]),
        "seconds": time.monotonic() - begin,
    }


def _child() -> None:
    asked = child.arguments()
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        _boost({"layers": 1, "hidden": 64, "heads": 1, "seq_len": 16, "host_bytes": 600_000}, folder)
        child.ready(None)
        result = _boost(asked, folder)
    child.finish(result)


if __name__ == "__main__":
    _child()
