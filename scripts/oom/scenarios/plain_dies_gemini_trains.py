"""Where plain PyTorch runs out of memory, Gemini trains to the end with the same losses."""

import tempfile
from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings
from training import attempt, outcome, ran_out, trained

from gemini.sizes import format_bytes

_FULL = {"layers": 8, "hidden": 384, "heads": 6, "seq_len": 64, "batch_size": 2, "steps": 5}
_SMALL = {"layers": 6, "hidden": 384, "heads": 6, "seq_len": 32, "batch_size": 1, "steps": 3}

# In units of the parameters' bytes P. Plain training holds 4 P (weights, gradients, two moments), so it cannot fit;
# of Gemini's the tiers get HOST_RATIO, the rest of the cap is for activations, threads and what malloc cannot use.
_HEADROOM_RATIO = 3.0
_HOST_RATIO = 1.5
_TIMEOUT_SECONDS = 120.0


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    parameter_bytes = 4 * _parameter_count(shape)
    headroom = int((settings.headroom_ratio or _HEADROOM_RATIO) * parameter_bytes)
    host_bytes = int(_HOST_RATIO * parameter_bytes)

    def train(kind: str, headroom_bytes: int | None) -> Ended:
        arguments = {"kind": kind, "headroom_bytes": headroom_bytes, "host_bytes": host_bytes, **shape}
        return run_child("plain_dies_gemini_trains", arguments, timeout_seconds=_TIMEOUT_SECONDS)

    free = train("plain", None)
    if free.result is None or free.result["error"]:
        raise Failure(f"plain training without a cap failed: {free.result or free.errors}")
    plain, gemini = train("plain", headroom), train("gemini", headroom)
    wanted = free.result["losses"]
    got = gemini.result["losses"] if gemini.result else []
    cap = f"with {format_bytes(headroom)} of head-room"
    return Report(
        name=SCENARIO.name,
        checks=(
            Check("plain PyTorch without a cap", f"{len(wanted)} steps", outcome(free), True),
            Check(f"plain PyTorch {cap}", "out of memory", outcome(plain), ran_out(plain)),
            Check(f"Gemini {cap}", f"{len(wanted)} steps", outcome(gemini), trained(gemini, len(wanted))),
            Check(
                "Gemini's losses",
                f"plain's, {wanted[0]:.6f} -> {wanted[-1]:.6f}",
                "the same" if got == wanted else f"{got}",
                got == wanted,
            ),
        ),
        facts={
            "parameter_bytes": parameter_bytes,
            "headroom_bytes": headroom,
            "host_memory_bytes": host_bytes,
            "losses": wanted,
            **{
                f"{name}_{what}": getattr(ended, what)
                for name, ended in (("plain_uncapped", free), ("plain", plain), ("gemini", gemini))
                for what in ("base_data_bytes", "data_growth_bytes", "rss_growth_bytes", "returncode")
            },
        },
        peaks={"Gemini's peak VmData": gemini.data_growth_bytes},
    )


def _parameter_count(shape: dict[str, int]) -> int:
    from gemini.train.model import GPTConfig

    config = GPTConfig(layers=shape["layers"], hidden=shape["hidden"], heads=shape["heads"], seq_len=shape["seq_len"])
    return config.parameter_count()


SCENARIO = Scenario(
    name="plain_dies_gemini_trains",
    summary="under one cap plain PyTorch runs out of memory, Gemini trains with plain's losses",
    quick=True,
    run=run,
)


# -- the child


def _train(asked: dict[str, Any], losses: list[float], folder: str) -> dict[str, Any]:
    """Train and append each step's loss. With ``kind`` plain: torch and nothing else."""
    import torch

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam
    from gemini.train.model import GPT2LMHeadModel, GPTConfig
    from gemini.train.text import Corpus

    corpus = Corpus.load(None)
    config = GPTConfig(**{name: asked[name] for name in ("layers", "hidden", "heads", "seq_len")})
    torch.manual_seed(0)
    booster = None
    optimizer: Any
    model: Any
    if asked["kind"] == "plain":
        model = GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    else:
        with LazyInitContext():
            model = GPT2LMHeadModel(config)
        plugin = GeminiPlugin(
            precision="fp32", host_memory=asked["host_bytes"], offload_dir=folder, telemetry=False, max_prefetch=1
        )
        booster = Booster(plugin=plugin)
        optimizer = HybridAdam(model.parameters(), lr=1e-3, weight_decay=0.01)
        model, optimizer, *_ = booster.boost(model, optimizer)
    for step in range(asked["steps"]):
        loss = model(*corpus.batch(0, step, asked["batch_size"], asked["seq_len"]))
        if booster is None:
            loss.backward()
        else:
            booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if booster is not None:
        model.memory_stats()
        list(model.named_parameters())  # waits for the last updates: they, too, must fit
    return {}


def _child() -> None:
    asked = child.arguments()
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        tiny = {"layers": 1, "hidden": 64, "heads": 1, "seq_len": asked["seq_len"], "batch_size": 1, "steps": 2}
        # Both ways in every child, so that all have the same libraries, kernels and threads when the cap is set.
        _train({**tiny, "kind": "plain"}, [], folder)
        _train({**tiny, "kind": "gemini", "host_bytes": 600_000}, [], folder)
        child.ready(asked["headroom_bytes"])
        result = attempt(lambda losses: _train(asked, losses, folder))
    child.finish(result)


if __name__ == "__main__":
    _child()
