"""A batch that does not fit is an error that can be caught, and training goes on as if it had never been tried."""

from typing import Any

import child
from child import Ended, run_child
from outcome import Check, Report, Scenario, Settings

from gemini.sizes import format_bytes

_FULL = {"layers": 8, "hidden": 384, "heads": 6, "seq_len": 128, "batch_size": 2, "too_large": 96}
_SMALL = {"layers": 4, "hidden": 128, "heads": 2, "seq_len": 64, "batch_size": 1, "too_large": 512}
_BESIDE_BYTES = 128 << 20
"""What there is beside the chunks for activations: plenty for the batch, too little for the large one."""
_TIMEOUT_SECONDS = 180.0


def run(settings: Settings) -> Report:
    shape = _SMALL if settings.small else _FULL
    model_data = 14 * _parameter_count(shape)
    host_memory = int(1.3 * model_data)
    headroom = int((settings.headroom_ratio or 1.0) * (host_memory + _BESIDE_BYTES))
    asked = {"host_memory": host_memory, "headroom_bytes": headroom, **shape}
    ended = {
        name: run_child("batch_too_large", {**asked, "tries": tries}, timeout_seconds=_TIMEOUT_SECONDS)
        for name, tries in (("tried", True), ("never tried", False))
    }
    return Report(
        name=SCENARIO.name,
        checks=tuple(_checks(ended["tried"], ended["never tried"], shape["too_large"], host_memory)),
        facts={
            "model_data_bytes": model_data,
            "headroom_bytes": headroom,
            **{f"{name}: {what}": getattr(of, what) for name, of in ended.items() for what in ("returncode", "result")},
        },
    )


def _checks(tried: Ended, never: Ended, rows: int, host_memory: int) -> list[Check]:
    if tried.result is None or never.result is None:
        died = next(ended for ended in (tried, never) if ended.result is None)
        return [Check("runs", "to its end", f"died with {died.returncode}: {died.errors.strip()[-200:]}", False)]
    error, message = tried.result["error"], tried.result["message"]
    ways = [way for way in ("smaller batch", "checkpoint activations", "_memory to ") if way in message]
    same = tried.result["losses"] == never.result["losses"]
    return [
        Check(f"a batch of {rows}", "OutOfMemory", error or "no error", error == "OutOfMemory"),
        Check("the message", "says what to change", ", ".join(ways) or message[:160], bool(ways)),
        Check("losses after it", "those of a run that never tried", f"{tried.result['losses'][-1]:.6f}", same),
        Check("no chunk is left in use", "0", str(tried.result["pinned"]), tried.result["pinned"] == 0),
        Check(
            "model data",
            f"within {format_bytes(host_memory)}",
            f"{format_bytes(tried.result['host_peak'])} at peak",
            tried.result["host_peak"] <= host_memory,
        ),
    ]


def _parameter_count(shape: dict[str, int]) -> int:
    from gemini.train.model import GPTConfig

    config = GPTConfig(layers=shape["layers"], hidden=shape["hidden"], heads=shape["heads"], seq_len=shape["seq_len"])
    return config.parameter_count()


SCENARIO = Scenario(
    name="batch_too_large",
    summary="a batch that does not fit raises OutOfMemory, and smaller ones then train to the same losses",
    quick=True,
    run=run,
)


# -- the child


class _Training:
    """A small GPT on real text."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import torch

        from gemini.booster import Booster
        from gemini.booster.plugin import GeminiPlugin
        from gemini.nn.optimizer import HybridAdam
        from gemini.train.model import GPT2LMHeadModel, GPTConfig
        from gemini.train.text import Corpus

        torch.manual_seed(0)
        self.corpus, self.seq_len = Corpus.load(None), asked["seq_len"]
        model: Any = GPT2LMHeadModel(
            GPTConfig(**{name: asked[name] for name in ("layers", "hidden", "heads", "seq_len")})
        )
        optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
        self.booster = Booster(plugin=GeminiPlugin(host_memory=asked["host_memory"], telemetry=False))
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)

    def step(self, number: int, rows: int) -> float:
        loss = self.model(*self.corpus.batch(0, number, rows, self.seq_len))
        self.booster.backward(loss, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _train(asked: dict[str, Any]) -> dict[str, Any]:
    from gemini.boosted import boosted

    training = _Training(asked)
    rows = asked["batch_size"]
    losses = [training.step(number, rows) for number in range(2)]
    error = message = ""
    if asked["tries"]:
        try:
            training.step(9, asked["too_large"])
        except (RuntimeError, MemoryError) as caught:
            error, message = type(caught).__name__, str(caught)
    losses += [training.step(number, rows) for number in range(2, 5)]
    stats = training.model.memory_stats()
    return {
        "losses": losses,
        "error": error,
        "message": message,
        "pinned": sum(chunk.pins > 0 for chunk in boosted(training.model).manager.chunks),
        "host_peak": stats["host/peak_bytes"],
    }


def _child() -> None:
    asked = child.arguments()
    tiny = {"layers": 1, "hidden": 64, "heads": 1, "seq_len": asked["seq_len"], "batch_size": 1}
    _train({**tiny, "host_memory": 4 << 20, "tries": False})
    child.ready(asked["headroom_bytes"])
    child.finish(_train(asked))


if __name__ == "__main__":
    _child()
