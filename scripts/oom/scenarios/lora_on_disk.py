"""Adapters train on a frozen base that does not fit in memory in bfloat16; losses and saved weights are peft's.

The base is on disk; or, in NF4, in RAM, or on disk with a smaller cap. peft then has the same values, dequantised by
hand.
"""

import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings
from training import attempt, outcome, ran_out, trained

from gemini.sizes import format_bytes

# TinyLlama's shape: 1.1 G parameters, 2.2 GB in bf16.
_FULL: dict[str, Any] = {
    "layers": 22, "hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000,
    "seq_len": 64, "steps": 3,
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "layers": 24, "hidden": 512, "inner": 1408, "heads": 8, "kv_heads": 2, "vocabulary": 2048,
    "seq_len": 16, "steps": 3,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Base:
    """How the base is kept, and under which limits, in units of the bytes of its bf16 weights."""

    name: str
    quantize: str | None
    headroom_ratio: float
    """The cap: less than the base takes."""
    small_headroom_ratio: float
    """The cap for a small model, beside which what every process takes is more."""
    host_ratio: float
    """For the tiers. The rest of the cap is for activations, threads, and one layer while adapters are merged."""
    bytes_per_parameter: float
    """The most that model data may take over all tiers, adapters with their states included."""
    on_disk: bool = True


_BF16 = Base("lora_on_disk", None, 0.4, 0.7, 0.2, 2.3)
_NF4 = Base("lora_on_nf4", "nf4", 0.3, 0.65, 0.15, 1.0)
_NF4_IN_RAM = Base("lora_on_nf4_in_ram", "nf4", 0.75, 1.0, 0.55, 1.0, on_disk=False)
_TIMEOUT_SECONDS = 600.0


def run(base: Base, settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    base_bytes = 2 * _parameter_count(shape)
    usual = base.small_headroom_ratio if settings.small else base.headroom_ratio
    headroom = int((settings.headroom_ratio or usual) * base_bytes)
    host_bytes = int(base.host_ratio * base_bytes)

    asked = {"quantize": base.quantize, "host_bytes": host_bytes, "on_disk": base.on_disk, **shape}

    def train(kind: str, headroom_bytes: int | None) -> Ended:
        arguments = {"kind": kind, "headroom_bytes": headroom_bytes, **asked}
        return run_child("lora_on_disk", arguments, timeout_seconds=_TIMEOUT_SECONDS)

    free = train("peft", None)
    if free.result is None or free.result["error"]:
        raise Failure(f"training with peft without a cap failed: {free.result or free.errors}")
    plain, gemini = train("peft", headroom), train("gemini", headroom)
    wanted = free.result["losses"]
    got = gemini.result or {"losses": [], "saved": None}
    cap = f"with {format_bytes(headroom)} of head-room for {format_bytes(base_bytes)} of frozen weights"
    per_parameter = got.get("model_data_bytes", 0) / (base_bytes / 2)
    return Report(
        name=base.name,
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
                "saved adapters" if base.quantize else "merged and saved weights",
                "peft's",
                "the same" if got.get("saved") == free.result["saved"] else "others",
                got.get("saved") == free.result["saved"],
            ),
            Check(
                "frozen weights and adapters over all tiers",
                f"at most {base.bytes_per_parameter} bytes a parameter",
                f"{per_parameter:.3f}",
                0 < per_parameter <= base.bytes_per_parameter,
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


SCENARIOS = (
    Scenario(
        name=_BF16.name,
        summary="adapters train on a base of 1.1 G parameters on disk, under a cap in which it does not fit",
        quick=False,
        run=partial(run, _BF16),
    ),
    Scenario(
        name=_NF4.name,
        summary="the same with the base in NF4, under a smaller cap",
        quick=False,
        run=partial(run, _NF4),
    ),
    Scenario(
        name=_NF4_IN_RAM.name,
        summary="the same with the base in NF4 in RAM, under a cap in which it does not fit in bf16",
        quick=False,
        run=partial(run, _NF4_IN_RAM),
    ),
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
    """Train adapters and save what came of it; with ``kind`` peft without management."""
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
    tiers = {"host_memory": asked["host_bytes"], **({"offload_dir": folder} if asked["on_disk"] else {})}
    booster = Booster(plugin=GeminiPlugin(precision="keep", telemetry=False, max_prefetch=1, **tiers))
    torch.manual_seed(1)
    adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model: Any = booster.enable_lora(base, adapters, asked["quantize"])
    if asked["quantize"] and not is_managed:
        _round(model, asked["quantize"])
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
    model_data_bytes = int(model.memory_stats()["model_data/total_bytes"]) if is_managed else 0
    return {"saved": _saved(booster, model, asked, folder), "model_data_bytes": model_data_bytes}


def _saved(booster: Any, model: Any, asked: dict[str, Any], folder: str) -> int:
    """Digest of the adapters, or of the merged weights: of files, if they are ours."""
    if asked["quantize"]:
        booster.save_lora_as_pretrained(model, folder, use_safetensors=True)
        return _digest(_stored(f"{folder}/adapter_model.safetensors"))
    merged = model.merge_and_unload()
    if asked["kind"] == "peft":
        return _digest(merged.state_dict().items())
    booster.save_model(merged, folder)
    return _digest(_stored(f"{folder}/model.safetensors"))


def _round(model: Any, quantize: str) -> None:
    """Give frozen layers the values that they have when they are kept in few bits."""
    from gemini.packing.quantised import quantised_parameters
    from gemini.quantization import Quantization

    form = Quantization(quantize)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    chosen = quantised_parameters(model, form, trained)
    for parameter in model.parameters():
        if id(parameter) in chosen:
            parameter.data = form.rounded(parameter.data)


def _stored(path: str) -> Iterable[tuple[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt", backend="pread") as file:
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
        tiny = {**asked, "layers": 1, "hidden": 64, "inner": 128, "vocabulary": 128, "steps": 2}
        # Both ways in every child, so that all have the same libraries, kernels and threads when the cap is set.
        for kind in ("peft", "gemini"):
            _train({**tiny, "kind": kind, "host_bytes": (1 if asked["on_disk"] else 64) << 20}, [], folder)
        child.ready(asked["headroom_bytes"])
        result = attempt(lambda losses: _train(asked, losses, folder))
    child.finish(result)


if __name__ == "__main__":
    _child()
