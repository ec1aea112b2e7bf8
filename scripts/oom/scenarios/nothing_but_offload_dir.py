"""Whatever `gemini-stat estimate` says fits trains from the first call with nothing but a folder for the disk tier."""

import contextlib
import io
import tempfile
from typing import Any

import child
import sweep_models
from child import Ended, run_child
from outcome import Check, Failure, Report, Scenario, Settings
from training import attempt, outcome, trained

from gemini.sizes import format_bytes

_HEADROOMS = (160 << 20, 288 << 20, 512 << 20)
"""What the training may take: the first is scarcely more than threads and kernels take, the last one holds the small
models."""
_STEPS = 3
_TIMEOUT_SECONDS = 150.0
_SMALL = (("small", "pictures"), _HEADROOMS[:1])


def run(settings: Settings) -> Report:
    names, headrooms = _SMALL if settings.small else (sweep_models.NAMES, _HEADROOMS)
    checks, facts = [], dict[str, Any]()
    for name in names:
        free = _train(name, None)
        if not trained(free, _STEPS):
            raise Failure(f"{name} without a cap: {outcome(free)}")
        for headroom in headrooms:
            ended = _train(name, headroom)
            fits = bool(ended.result and ended.result["fits"])
            is_alike = trained(ended, _STEPS) and _losses(ended) == _losses(free)
            what = f"{name} with {format_bytes(headroom)} of head-room"
            expected = f"{_STEPS} steps, the losses of a run without a cap" if fits else "no promise: it does not fit"
            checks.append(Check(what, expected, outcome(ended), is_alike or (not fits and ended.result is not None)))
            facts[f"{name}_{headroom}"] = {"fits": fits, "trained": is_alike, "peak_bytes": ended.data_growth_bytes}
    return Report(name=SCENARIO.name, checks=tuple(checks), facts=facts)


def _train(name: str, headroom: int | None) -> Ended:
    arguments = {"name": name, "headroom_bytes": headroom}
    return run_child("nothing_but_offload_dir", arguments, timeout_seconds=_TIMEOUT_SECONDS)


def _losses(ended: Ended) -> list[float]:
    return list(ended.result["losses"]) if ended.result is not None else []


SCENARIO = Scenario(
    name="nothing_but_offload_dir",
    summary="12 models under 3 caps: what the estimate says fits trains, with the losses of a run without a cap",
    quick=False,
    run=run,
)


# -- the child


def _steps(name: str, folder: str, losses: list[float], count: int) -> dict[str, Any]:
    import torch

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam

    torch.manual_seed(0)
    with LazyInitContext():
        module, batch = getattr(sweep_models, name)()
    booster = Booster(plugin=GeminiPlugin(offload_dir=folder, telemetry=False))
    optimizer: Any = HybridAdam(module.parameters(), lr=1e-3)
    model, optimizer, *_ = booster.boost(module, optimizer)
    for step in range(count):
        torch.manual_seed(step)
        loss = model(**batch(1, 1))
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.memory_stats()
    return {}


def _fits(name: str, headroom: int | None) -> bool:
    """What the estimate says of this much RAM."""
    from gemini.stat.cli import main

    if headroom is None:
        return True
    arguments = ["estimate", f"sweep_models:{name}", "--ram", str(headroom), "--disk", "20GiB", "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        return main([*arguments, "--optimizer", "HybridAdam"]) == 0


def _child() -> None:
    asked = child.arguments()
    fits = _fits(asked["name"], asked["headroom_bytes"])
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as folder:
        _steps("small", folder, [], 2)
        child.ready(asked["headroom_bytes"])
        result = attempt(lambda losses: _steps(asked["name"], folder, losses, _STEPS))
    child.finish({**result, "fits": fits})


if __name__ == "__main__":
    _child()
