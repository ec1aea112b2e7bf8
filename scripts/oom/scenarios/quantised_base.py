"""Adapters train on a base in NF4 under caps in which its bf16 weights do not fit: on the host, and on disk."""

import tempfile
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings
from training import attempt, outcome, ran_out, trained

from gemini.sizes import format_bytes

# TinyLlama's shape: 1.1 G parameters, 2.2 GB in bf16.
_FULL: dict[str, Any] = {
    "layers": 22, "hidden": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000,
    "seq_len": 64, "steps": 3, "host": (0.75, 0.55), "disk": (0.4, 0.2),
}  # fmt: skip
_SMALL: dict[str, Any] = {
    "layers": 24, "hidden": 512, "inner": 1408, "heads": 8, "kv_heads": 2, "vocabulary": 2048,
    "seq_len": 16, "steps": 3, "host": (0.9, 0.5), "disk": (0.7, 0.2),
}  # fmt: skip
"""``host`` and ``disk``: the cap, and of it what Gemini's tiers get, in units of the bytes of the base in bf16."""
_TIMEOUT_SECONDS = 900.0
_BOUND = 0.6


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    base_bytes = 2 * _parameter_count(shape)

    def train(kind: str, cap: float | None = None, of_tiers: float = 0.0) -> Ended:
        headroom = None if cap is None else int(cap * base_bytes)
        arguments = {"kind": kind, "headroom_bytes": headroom, "host_bytes": int(of_tiers * base_bytes), **shape}
        return run_child("quantised_base", arguments, timeout_seconds=_TIMEOUT_SECONDS)

    free = train("by hand")
    if free.result is None or free.result["error"]:
        raise Failure(f"training with peft without a cap failed: {free.result or free.errors}")
    wanted = free.result["losses"]
    dense = train("dense", *shape["host"])
    checks = [
        Check("peft, weights dequantised by hand, without a cap", f"{len(wanted)} steps", outcome(free), True),
        Check(f"bf16 weights {_cap(shape['host'], base_bytes)}", "out of memory", outcome(dense), ran_out(dense)),
    ]
    peaks: dict[str, int] = {}
    for where in ("host", "disk"):
        ended = train(where, *shape[where])
        got = ended.result or {"losses": [], "bytes_per_parameter": 0.0}
        per_parameter = got.get("bytes_per_parameter", 0.0)
        checks += [
            Check(
                f"NF4 on {where} {_cap(shape[where], base_bytes)}",
                f"{len(wanted)} steps",
                outcome(ended),
                trained(ended, len(wanted)),
            ),
            Check(
                f"its losses on {where}",
                f"those by hand, {wanted[0]:.6f} -> {wanted[-1]:.6f}",
                "the same" if got["losses"] == wanted else f"{got['losses']}",
                got["losses"] == wanted,
            ),
            Check(
                f"quantised weights on {where}",
                f"at most {_BOUND} bytes a parameter",
                f"{per_parameter:.4f}",
                0 < per_parameter <= _BOUND,
            ),
        ]
        peaks[f"Gemini's peak VmData, base on {where}"] = ended.data_growth_bytes
    return Report(
        name=SCENARIO.name,
        checks=tuple(checks),
        facts={"base_bytes": base_bytes, "losses": wanted, "by_hand_data_growth_bytes": free.data_growth_bytes},
        peaks=peaks,
    )


def _cap(share: tuple[float, float], base_bytes: int) -> str:
    return f"with {format_bytes(int(share[0] * base_bytes))} of head-room for {format_bytes(base_bytes)} in bf16"


def _parameter_count(shape: dict[str, Any]) -> int:
    hidden, narrow = shape["hidden"], shape["hidden"] // shape["heads"] * shape["kv_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * shape["inner"] + 2 * hidden
    count: int = shape["layers"] * layer + 2 * shape["vocabulary"] * hidden + hidden
    return count


SCENARIO = Scenario(
    name="quantised_base",
    summary="adapters train on a base of 1.1 G parameters in NF4, on host and on disk, under caps too small for bf16",
    quick=False,
    run=run,
)


# -- the child


def _base(asked: dict[str, Any], lazy: bool) -> Any:
    from contextlib import nullcontext

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gemini.lazy import LazyInitContext

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
        with LazyInitContext() if lazy else nullcontext():
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def _train(asked: dict[str, Any], losses: list[float], folder: str) -> dict[str, Any]:
    import torch
    from peft import LoraConfig

    from gemini.boosted import boosted
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.chunk import ABSMAX
    from gemini.nn.optimizer import HybridAdam
    from gemini.quantization import Quantization

    kind = asked["kind"]
    tiers = {"host_memory": asked["host_bytes"] or None, **({"offload_dir": folder} if kind == "disk" else {})}
    booster = Booster(plugin=GeminiPlugin(precision="keep", telemetry=False, max_prefetch=1, **tiers))
    base = _base(asked, lazy=kind != "by hand")
    quantize = None if kind in ("by hand", "dense") else "nf4"
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model: Any = booster.enable_lora(base, lora_config=config, quantize=quantize)
    optimizer: Any = HybridAdam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if kind == "by hand":
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2 and not parameter.requires_grad:
                parameter.data = Quantization("nf4").rounded(parameter)
    else:
        model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(asked["steps"]):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, asked["vocabulary"], (1, asked["seq_len"]), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward() if kind == "by hand" else booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if kind == "by hand":
        return {}
    chunks = [chunk for chunk in boosted(model).manager.chunks if ABSMAX in chunk.homes]
    numel = sum(slot.numel for chunk in chunks for slot in chunk.layout.slots)
    nbytes = sum(home.nbytes for chunk in chunks for home in chunk.homes.values())
    return {"bytes_per_parameter": nbytes / max(numel, 1)}


def _child() -> None:
    asked = child.arguments()
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        tiny = {**_SMALL, "layers": 1, "hidden": 64, "inner": 128, "vocabulary": 128, "steps": 2}
        # Each way in every child, so that all have the same libraries, kernels and threads when the cap is set.
        for kind in ("by hand", "disk"):
            _train({**tiny, "kind": kind, "host_bytes": 1 << 20}, [], folder)
        child.ready(asked["headroom_bytes"])
        result = attempt(lambda losses: _train(asked, losses, folder))
    child.finish(result)


if __name__ == "__main__":
    _child()
