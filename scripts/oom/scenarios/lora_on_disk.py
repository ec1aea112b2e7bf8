"""Adapters train on a frozen base that does not fit in memory but on disk; losses and merged weights are peft's."""

import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings
from training import attempt, outcome, ran_out, trained

from gemini.sizes import format_bytes

# TinyLlama's shape: 1.1 G parameters, 2.2 GB in bf16.
_FULL: dict[str, Any] = {
    "layers": 22, "hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000,
    "seq_len": 64, "steps": 3, "headroom_ratio": 0.4,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "layers": 24, "hidden": 512, "inner": 1408, "heads": 8, "kv_heads": 2, "vocabulary": 2048,
    "seq_len": 16, "steps": 3, "headroom_ratio": 0.7,
}  # fmt: skip

# In units of the bytes of the base's bf16 weights, all of which plain peft has in memory. Of the cap, headroom_ratio,
# Gemini's tiers get HOST_RATIO; the rest is for activations, threads, and one layer while adapters are merged.
_HOST_RATIO = 0.2
_TIMEOUT_SECONDS = 600.0


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    base_bytes = 2 * _parameter_count(shape)
    headroom = int((settings.headroom_ratio or shape["headroom_ratio"]) * base_bytes)
    host_bytes = int(_HOST_RATIO * base_bytes)

    def train(kind: str, headroom_bytes: int | None) -> Ended:
        arguments = {"kind": kind, "headroom_bytes": headroom_bytes, "host_bytes": host_bytes, **shape}
        return run_child("lora_on_disk", arguments, timeout_seconds=_TIMEOUT_SECONDS)

    free = train("peft", None)
    if free.result is None or free.result["error"]:
        raise Failure(f"training with peft without a cap failed: {free.result or free.errors}")
    plain, gemini = train("peft", headroom), train("gemini", headroom)
    wanted = free.result["losses"]
    got = gemini.result or {"losses": [], "merged": None}
    cap = f"with {format_bytes(headroom)} of head-room for {format_bytes(base_bytes)} of frozen weights"
    per_parameter = got.get("model_data_bytes", 0) / (base_bytes / 2)
    return Report(
        name=SCENARIO.name,
        checks=(
            Check("peft without a cap", f"{len(wanted)} steps", outcome(free), True),
            Check(f"peft {cap}", "out of memory", outcome(plain), ran_out(plain)),
            Check(f"Gemini {cap}", f"{len(wanted)} steps", outcome(gemini), trained(gemini, len(wanted))),
            Check(
                "Gemini's losses",
                f"peft's, {wanted[0]:.6f} -> {wanted[-1]:.6f}",
                "the same" if got["losses"] == wanted else f"{got['losses']}",
                got["losses"] == wanted,
            ),
            Check(
                "merged and saved weights",
                "peft's",
                "the same" if got.get("merged") == free.result["merged"] else "others",
                got.get("merged") == free.result["merged"],
            ),
            Check(
                "frozen weights and adapters over all tiers",
                "at most 2.3 bytes a parameter",
                f"{per_parameter:.3f}",
                0 < per_parameter <= 2.3,
            ),
        ),
        facts={
            "base_bytes": base_bytes,
            "headroom_bytes": headroom,
            "host_memory_bytes": host_bytes,
            "losses": wanted,
            **{
                f"{name}_{what}": getattr(ended, what)
                for name, ended in (("peft_uncapped", free), ("peft", plain), ("gemini", gemini))
                for what in ("base_data_bytes", "data_growth_bytes", "rss_growth_bytes", "returncode")
            },
        },
        peaks={"Gemini's peak VmData": gemini.data_growth_bytes},
    )


def _parameter_count(shape: dict[str, Any]) -> int:
    hidden, narrow = shape["hidden"], shape["hidden"] // shape["heads"] * shape["kv_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * shape["inner"] + 2 * hidden
    count: int = shape["layers"] * layer + 2 * shape["vocabulary"] * hidden + hidden
    return count


SCENARIO = Scenario(
    name="lora_on_disk",
    summary="adapters train on a base of 1.1 G parameters on disk, under a cap in which it does not fit",
    quick=False,
    run=run,
)


# -- the child


def _base(asked: dict[str, Any]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=asked["vocabulary"],
        hidden_size=asked["hidden"],
        intermediate_size=asked["inner"],
        num_hidden_layers=asked["layers"],
        num_attention_heads=asked["heads"],
        num_key_value_heads=asked["kv_heads"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def _train(asked: dict[str, Any], losses: list[float], folder: str) -> dict[str, Any]:
    """Train adapters, merge them, save; with ``kind`` peft without management."""
    from contextlib import nullcontext

    import torch
    from peft import LoraConfig

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam

    is_managed = asked["kind"] == "gemini"
    with LazyInitContext() if is_managed else nullcontext():
        base = _base(asked)
    booster = Booster(
        plugin=GeminiPlugin(
            precision="keep", host_memory=asked["host_bytes"], offload_dir=folder, telemetry=False, max_prefetch=1
        )
    )
    torch.manual_seed(1)
    model: Any = booster.enable_lora(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if is_managed:
        model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(asked["steps"]):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, asked["vocabulary"], (1, asked["seq_len"]), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        if is_managed:
            booster.backward(loss, optimizer)
        else:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not is_managed:
        merged = model.merge_and_unload()
        return {"merged": _digest((name, value) for name, value in merged.state_dict().items())}
    stats = model.memory_stats()
    booster.save_model(model.merge_and_unload(), folder)
    return {"merged": _digest(_stored(folder)), "model_data_bytes": int(stats["model_data/total_bytes"])}


def _stored(folder: str) -> Iterable[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(Path(folder) / "model.safetensors", framework="pt", backend="pread") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def _digest(tensors: Iterable[tuple[str, Any]]) -> int:
    """Of names and values, whatever their order."""
    import torch

    digest = 0
    for name, value in tensors:
        data = value.detach().contiguous().view(torch.uint8).numpy().data
        digest ^= zlib.crc32(name.encode(), zlib.crc32(data))
    return digest


def _child() -> None:
    asked = child.arguments()
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        tiny = {**_SMALL, "layers": 1, "hidden": 64, "inner": 128, "vocabulary": 128, "steps": 2}
        # Both ways in every child, so that all have the same libraries, kernels and threads when the cap is set.
        _train({**tiny, "kind": "peft", "host_bytes": 1 << 20}, [], folder)
        _train({**tiny, "kind": "gemini", "host_bytes": 1 << 20}, [], folder)
        child.ready(asked["headroom_bytes"])
        result = attempt(lambda losses: _train(asked, losses, folder))
    child.finish(result)


if __name__ == "__main__":
    _child()
