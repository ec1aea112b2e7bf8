"""Training under hard limits of the system: it has the losses of a run without, or ends with an error whose cure works.

Each trial is a forked child under RLIMIT_DATA (what is there after imports, and a multiple of the model's size in
float32), RLIMIT_NPROC or RLIMIT_NOFILE. An error has to be of `gemini.errors`; the cure that it names is read from its
message, followed in another child under the same limit (or under the limit that it asks for), and has to work.
"""

import argparse
import importlib
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

NOBODY = 65534
WIDTH, LAYERS, STEPS = 512, 8, 3
SIZE_BYTES = 4 * 12 * WIDTH * WIDTH * LAYERS
TIMEOUT_SECONDS = 120.0
MOST_CURES = 3
"""One cure may lead to the next shortage, such as that of the disk."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training in a child."""

    limits: dict[str, int]
    """By the names of `resource`; of RLIMIT_DATA the bytes beyond what is there."""
    keywords: dict[str, Any] = field(default_factory=dict)
    """Of the plugin."""
    batch: int = 4


@dataclass(frozen=True)
class Ended:
    """What became of it."""

    losses: list[float] | None
    error: str = ""
    kind: str = ""
    is_typed: bool = False
    where: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caps", type=int, default=50, help="how many limits of data, half of them with a folder (50)")
    parser.add_argument("--lowest", type=float, default=1.1, help="times the model's size (1.1)")
    parser.add_argument("--highest", type=float, default=5.0, help="times the model's size (5)")
    parser.add_argument("--counts", default="", help="these limits, too: RLIMIT_NOFILE=4,RLIMIT_NPROC=6")
    parser.add_argument("--verbose", action="store_true", help="tell each trial's end on stderr")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    free = _import_all()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # for NOBODY
        os.environ["XDG_STATE_HOME"] = folder
        trials = list(_trials(arguments, folder))
        outcomes = [_outcome(trial, free, folder, arguments.verbose) for trial in trials]
    wrong = [text for text in outcomes if text not in ("trained", "cured")]
    return {"ok": not wrong, "trials": len(trials), "counts": dict(Counter(outcomes))}


def _trials(arguments: argparse.Namespace, folder: str) -> Iterator[Trial]:
    span, count = arguments.highest - arguments.lowest, arguments.caps // 2
    times = [arguments.lowest + span * i / max(count - 1, 1) for i in range(count)]
    limits = [{"RLIMIT_DATA": int(t * SIZE_BYTES)} for t in times]
    for text in filter(None, arguments.counts.split(",")):
        name, number = text.split("=")
        limits.append({name: int(number)})
    for each in limits:
        yield Trial(limits=each)
        yield Trial(limits=each, keywords={"offload_dir": folder})


def _outcome(trial: Trial, losses: list[float], folder: str, verbose: bool) -> str:
    """``"trained"``, ``"cured"`` if all that its errors name works, or what is wrong."""
    waiting, is_first = [(trial, 0)], True
    while waiting:
        tried, depth = waiting.pop()
        ended = trained(tried)
        if verbose:
            _tell(tried, ended)
        if ended.losses is not None:
            if tried.batch == trial.batch and ended.losses != losses:
                return "other losses"
            if is_first:
                return "trained"
            continue
        is_first = False
        if not ended.is_typed:
            return f"raw {ended.kind}: {ended.error[:80]} at {ended.where}"
        cures = cures_of(tried, ended.error, folder)
        if not cures or depth == MOST_CURES:
            return f"no cure after {depth} in {ended.kind}: {ended.error[-400:]}"
        waiting += [(each, depth + 1) for each in cures]
    return "cured"


def _tell(trial: Trial, ended: Ended) -> None:
    named = {name: round(n / SIZE_BYTES, 2) if name == "RLIMIT_DATA" else n for name, n in trial.limits.items()}
    print(named, trial.keywords, trial.batch, ended, file=sys.stderr, flush=True)


def cures_of(trial: Trial, message: str, folder: str) -> list[Trial]:
    """The trial as the message says that it should be, in each of the ways that it names."""
    said = re.split(r", or (?=set |give |raise |use )", message.rsplit("; ", 1)[-1])
    found = [_followed(trial, each, folder) for each in said]
    return [each for each in found if each != trial]


def _followed(trial: Trial, cure: str, folder: str) -> Trial:
    keywords, limits, batch = dict(trial.keywords), dict(trial.limits), trial.batch
    for name, more in re.findall(r"raise (RLIMIT_\w+)[^;]*? by (\d+)", cure):
        limits[name] += int(more)
    keywords |= {name: int(size) for name, size in re.findall(r"(\w+_memory) to (\d+) bytes", cure)}
    if "offload_dir=..." in cure:
        keywords["offload_dir"] = folder
    if "smaller batch" in cure and keywords == trial.keywords:
        batch = 1
    return replace(trial, keywords=keywords, limits=limits, batch=batch)


# -- the child


def trained(trial: Trial) -> Ended:
    """Train in a child that is forked now, before this process has any thread of ours."""
    return _forked(lambda: _train(trial), trial.limits)


def _import_all() -> list[float]:
    """Have in this process, which trains nothing, all that a training imports: it is there before the limits are.

    Returns
    -------
    list
        The losses without any limit.
    """
    ended = _forked(lambda: [*_train(Trial(limits={})), *sorted(sys.modules)], {})
    assert ended.losses is not None, ended
    for name in ended.losses[STEPS:]:
        with suppress(Exception):  # what exists only as a side effect of another import
            importlib.import_module(str(name))
    return ended.losses[:STEPS]


def _forked(task: Callable[[], list[Any]], limits: dict[str, int]) -> Ended:
    import gemini.booster.plugin
    import gemini.nn.optimizer  # noqa: F401 - all imports are there before the limit is

    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _limit(limits)
        try:
            said: dict[str, Any] = {"losses": task()}
        except BaseException as error:
            from gemini.errors import GeminiError

            said = {"losses": None, "error": str(error), "kind": type(error).__name__, "where": _where(error)}
            said["is_typed"] = isinstance(error, GeminiError)
        os.write(write_end, json.dumps(said).encode())
        os._exit(0)
    os.close(write_end)
    data = _read(read_end, child)
    os.close(read_end)
    _, status = os.waitpid(child, 0)
    if not data:
        return Ended(None, f"the child ended with {os.waitstatus_to_exitcode(status)} and said nothing", "death")
    return Ended(**json.loads(data))


def _read(descriptor: int, child: int) -> bytes:
    end, data = time.monotonic() + TIMEOUT_SECONDS, b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            return b""
        part = os.read(descriptor, 65536)
        if not part:
            return data
        data += part


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))[:300]


def _limit(limits: dict[str, int]) -> None:
    if "RLIMIT_NPROC" in limits and os.getuid() == 0:
        os.setuid(NOBODY)  # root may have as many threads as it likes
    status = Path("/proc/self/status").read_text()
    for name, value in limits.items():
        if name == "RLIMIT_DATA":
            data = re.search(r"VmData:\s+(\d+) kB", status)
            assert data is not None
            value += int(data[1]) * 1024
        resource.setrlimit(getattr(resource, name), (value, value))


def _train(trial: Trial) -> list[float]:
    import torch
    from torch import nn

    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam

    torch.manual_seed(0)
    with LazyInitContext():
        blocks = [
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 6 * WIDTH), nn.GELU(), nn.Linear(6 * WIDTH, WIDTH))
            for _ in range(LAYERS)
        ]
        model: Any = nn.Sequential(*blocks)
    optimizer: Any = HybridAdam(model.parameters(), lr=1e-3)
    booster = Booster(plugin=GeminiPlugin(telemetry=False, **trial.keywords))
    model, optimizer, *_ = booster.boost(model, optimizer)
    losses = []
    for step in range(STEPS):
        x = torch.randn(trial.batch, 32, WIDTH, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x).float().square().mean()
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
