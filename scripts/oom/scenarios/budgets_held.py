"""Whatever the capacities, a run takes no more RAM than they say and a constant: the system sees to it."""

import tempfile
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Report, Scenario, Settings

from gemini.sizes import format_bytes

_FULL = {"layers": 12, "hidden": 512, "heads": 8, "seq_len": 128, "batch_size": 2, "steps": 4}
_SMALL = {"layers": 6, "hidden": 256, "heads": 4, "seq_len": 32, "batch_size": 1, "steps": 3}

_CONSTANT_BYTES = 96 << 20
"""For what is not model data: activations, one gradient on its way, stacks of threads, what malloc cannot use."""

# In units of the model data (14 bytes a parameter). Without a device the first number bounds all that is in RAM.
_MIXES: dict[str, dict[str, float]] = {
    "all in RAM": {"host_memory": 1.3},
    "half in RAM, half on disk": {"host_memory": 0.5, "disk_memory": 1.0},
    "a fifth in RAM, the rest on disk": {"host_memory": 0.2, "disk_memory": 1.0},
    "a small device, the rest in RAM": {"device_memory": 0.1, "host_memory": 1.2},
    "a small device, some RAM, the rest on disk": {"device_memory": 0.1, "host_memory": 0.3, "disk_memory": 1.0},
}
_SMALL_MIXES = ("all in RAM", "a small device, some RAM, the rest on disk")
_TIMEOUT_SECONDS = 180.0


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    model_data = 14 * _parameter_count(shape)
    ended: dict[str, Ended] = {}
    limits: dict[str, int] = {}
    for name in _SMALL_MIXES if settings.small else _MIXES:
        capacities = {tier: int(share * model_data) for tier, share in _MIXES[name].items()}
        in_ram = sum(nbytes for tier, nbytes in capacities.items() if tier != "disk_memory")
        limits[name] = int((settings.headroom_ratio or 1.0) * (in_ram + _CONSTANT_BYTES))
        arguments = {"capacities": capacities, "headroom_bytes": limits[name], **shape}
        ended[name] = run_child("budgets_held", arguments, timeout_seconds=_TIMEOUT_SECONDS)
    first = next(iter(ended.values())).result or {}
    checks = []
    for name, of_mix in ended.items():
        result = of_mix.result
        is_good = result is not None and not result["error"] and of_mix.data_growth_bytes <= limits[name]
        beside = limits[name] - _CONSTANT_BYTES
        checks.append(
            Check(
                name,
                f"at most {format_bytes(limits[name])}: {format_bytes(beside)} of capacity and a constant",
                f"{format_bytes(of_mix.data_growth_bytes)} at peak{_trouble(of_mix)}",
                is_good,
            )
        )
        if result is not None and not result["error"]:
            over = [tier for tier in ("device", "host", "disk") if result[f"{tier}_peak"] > result[f"{tier}_capacity"]]
            checks.append(Check(f"{name}: tiers", "within their capacities", str(over or "within"), not over))
            same = result["losses"] == first.get("losses")
            checks.append(Check(f"{name}: losses", "the same in all mixes", f"{result['losses'][-1]:.6f}", same))
    return Report(
        name=SCENARIO.name,
        checks=tuple(checks),
        facts={
            "model_data_bytes": model_data,
            "constant_bytes": _CONSTANT_BYTES,
            **{
                f"{name}: {what}": getattr(of_mix, what)
                for name, of_mix in ended.items()
                for what in ("data_growth_bytes", "rss_growth_bytes", "returncode", "result")
            },
        },
    )


def _trouble(ended: Ended) -> str:
    if ended.result is None:
        return f", died with {ended.returncode}: {ended.errors.strip()[-200:]}"
    return f", {ended.result['error']}" if ended.result["error"] else ""


def _parameter_count(shape: dict[str, int]) -> int:
    from gemini.train.model import GPTConfig

    config = GPTConfig(layers=shape["layers"], hidden=shape["hidden"], heads=shape["heads"], seq_len=shape["seq_len"])
    return config.parameter_count()


SCENARIO = Scenario(
    name="budgets_held",
    summary="at five mixes of device, RAM and disk the peak stays within the capacities and a constant",
    quick=True,
    run=run,
)


# -- the child


def _train(asked: dict[str, Any], folder: str) -> dict[str, Any]:
    import torch

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel, GPTConfig
    from gemini.train.text import Corpus

    corpus = Corpus.load(None)
    torch.manual_seed(0)
    with LazyInitContext():
        model: Any = GPT2LMHeadModel(
            GPTConfig(**{name: asked[name] for name in ("layers", "hidden", "heads", "seq_len")})
        )
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    has_disk = "disk_memory" in asked["capacities"]
    plugin = GeminiPlugin(**asked["capacities"], offload_dir=folder if has_disk else None, telemetry=False)
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(asked["steps"]):
        loss = model(*corpus.batch(0, step, asked["batch_size"], asked["seq_len"]))
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    list(model.named_parameters())  # waits for the last updates
    stats = model.memory_stats()
    tiers = {
        f"{tier}_{what}": stats[f"{tier}/{what}_bytes"]
        for tier in ("device", "host", "disk")
        for what in ("peak", "capacity")
    }
    return {"losses": losses, "error": "", **tiers}


def _child() -> None:
    asked = child.arguments()
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        tiny = {"layers": 1, "hidden": 64, "heads": 1, "seq_len": asked["seq_len"], "batch_size": 1, "steps": 2}
        _train({**tiny, "capacities": {"host_memory": 700_000, "disk_memory": 10**7}}, folder)
        child.ready(asked["headroom_bytes"])
        try:
            result = _train(asked, folder)
        except (RuntimeError, MemoryError) as caught:
            result = {"error": str(caught)[:300] or type(caught).__name__}
    child.finish(result)


if __name__ == "__main__":
    _child()
