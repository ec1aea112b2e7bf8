"""A process that has imported everything and forks one child for each training, so that these begin alike and at once.

::

    matrix --task--> nursery --fork--> rank 0, rank 1: warm up, set the cap, train, read what the kernel has noted
           <--what each has read--      <--files--

The peaks are the kernel's own: ``VmHWM``, the most that was resident, and ``VmPeak``, the most address space. Nobody
polls, so nothing is missed.
"""

import ctypes
import gc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

_LOOK_SECONDS = 0.01
_END_SECONDS = 20.0
_ON_THEIR_WAY_BYTES = 4 << 20
"""Instead of 32 MiB of activations that wait for the disk. How many wait depends on the disk's speed at the moment, and
must be little beside a small model's peak."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the system says of a process, in bytes."""

    resident: int
    anonymous: int
    data: int
    space: int
    peak_resident: int
    peak_space: int


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank of a training tells."""

    losses: list[float]
    error: str
    out_of_memory: bool
    peak_resident: int
    """Growth of the resident set from the warm process to its highest."""
    peak_space: int
    """The same of the address space."""
    rest_anonymous: int
    """What is there of anonymous memory when the last update is over, above the warm process."""
    left_anonymous: int
    """The same when model and optimizer are gone."""
    facts: dict[str, Any]

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Told":
        return cls(**{field.name: content[field.name] for field in fields(cls)})


def _read() -> Reading:
    text = Path("/proc/self/status").read_text()
    found = {line.split(":", 1)[0]: line.split(":", 1)[1] for line in text.splitlines() if ":" in line}
    names = ("VmRSS", "RssAnon", "VmData", "VmSize", "VmHWM", "VmPeak")
    return Reading(*(int(found[name].split()[0]) << 10 for name in names))


def _be(task: dict[str, Any], rank: int, folder: Path) -> None:
    """One rank of a training, from its fork to its end."""
    from matrix.cases import Case
    from matrix.models import Size

    case, size = Case(**task["case"]), Size(**task["size"])
    if task["port"] is not None:
        _join(rank, case.ranks, task["port"])
    if task["sabotage"] is not None and task["kind"] != "plain":
        _call(task["sabotage"])
    warm: list[float] = []
    _train(case, task["kind"], rank, folder, warm, Size(), tiny=True)
    _clean()
    before = _read()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    if task["headroom_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (before.data + task["headroom_bytes"],) * 2)
    losses: list[float] = []
    error, out_of_memory, facts, rest = "", False, dict[str, Any](), before
    try:
        facts, rest = _train(case, task["kind"], rank, folder, losses, size, tiny=False)
    except BaseException as caught:
        error = "".join(traceback.format_exception_only(caught)).strip()[:1500]
        out_of_memory = _is_out_of_memory(caught)
        del caught
    _clean()
    after = _read()
    told = Told(
        losses,
        error,
        out_of_memory,
        peak_resident=after.peak_resident - before.resident,
        peak_space=after.peak_space - before.space,
        rest_anonymous=rest.anonymous - before.anonymous,
        left_anonymous=after.anonymous - before.anonymous,
        facts=facts,
    )
    (folder / f"{rank}.part").write_text(json.dumps(asdict(told)))
    os.replace(folder / f"{rank}.part", folder / f"{rank}.json")


def _train(
    case: Any, kind: str, rank: int, folder: Path, losses: list[float], size: Any, *, tiny: bool
) -> tuple[Any, Reading]:
    from matrix.training import STEPS, Ours, Plain

    training: Any
    if kind == "plain":
        training = Plain(case, tiny=tiny, size=size)
    else:
        training = Ours(case, folder, tiny=tiny, size=size, only_folder=kind == "default")
    for number in range(STEPS):
        losses.extend(training.step(number, rank))
    facts = training.rest()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return facts, _read()


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    text = str(error)
    said = "can't allocate memory" in text or "bad_alloc" in text or "could not create a memory" in text
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and said)


def _clean() -> None:
    deadline = time.monotonic() + _END_SECONDS
    for _ in range(3):  # what a graph's hooks hold goes with the second collection
        gc.collect()
    # Of several ranks each keeps its part until all are done with it.
    while any(t.name.startswith("gemini-memory-goodbye") for t in threading.enumerate()):
        if time.monotonic() > deadline:
            raise RuntimeError("the ranks have not said goodbye")
        time.sleep(_LOOK_SECONDS)
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _join(rank: int, size: int, port: int) -> None:
    import gemini

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    gemini.launch_from_torch(timeout=120)


def _call(place: str) -> None:
    """Call ``FILE:FUNCTION``: how a test breaks the product from outside."""
    file, _, function = place.partition(":")
    spec = importlib.util.spec_from_file_location("sabotage", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sabotage"] = module
    spec.loader.exec_module(module)
    getattr(module, function)()


# -- the parent


def _serve() -> None:
    _get_ready()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(task: dict[str, Any]) -> list[Any]:
    """Fork the ranks of a training and wait for them; for each what it told, or how it ended."""
    with tempfile.TemporaryDirectory(prefix="gemini-memory-oom-") as name:
        folder = Path(name)
        pids = []
        for rank in range(task["processes"]):
            pid = os.fork()
            if pid == 0:
                _exit(task, rank, folder)
            pids.append(pid)
        statuses = _wait(pids, time.monotonic() + task["seconds"])
        ended: list[Any] = []
        for rank, status in enumerate(statuses):
            file = folder / f"{rank}.json"
            log = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
            ended.append(json.loads(file.read_text()) if file.exists() else f"ended with {status}: {log[-1:]}")
        return ended


def _wait(pids: list[int], deadline: float) -> list[int | None]:
    ended: dict[int, int | None] = {}
    while len(ended) < len(pids):
        for pid in pids:
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ended[pid] = None
        time.sleep(_LOOK_SECONDS)
    return [ended[pid] for pid in pids]


def _exit(task: dict[str, Any], rank: int, folder: Path) -> NoReturn:
    """A child's life: its output goes to a file, and it does not come back."""
    status = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY, 0o600)
        for target in (1, 2):
            os.dup2(log, target)
        _be(task, rank, folder)
        status = 0
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(status)


def _get_ready() -> None:
    """Import what children import and compile what they compute with."""
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401
    import torch

    from gemini.activations import make
    from gemini.booster import Booster  # noqa: F401
    from gemini.nn.optimizer import HybridAdam
    from gemini.updates.update_queue import warm_up
    from matrix import models

    for name in ("gpt", "llama", "t5", "moe", "vit", "lora"):
        model = models.build(name, tiny=True)
        model(**models.batch(name, 0, is_long=False, dtype=torch.float32))
    models.adapted(models.build("lora", tiny=True))
    optimizer = HybridAdam([torch.nn.Parameter(torch.zeros(1))])
    for dtype in (torch.float32, torch.bfloat16):
        warm_up(optimizer.rules, optimizer.param_groups, torch.device("cpu"), dtype, False)
    make.LIMIT_BYTES = _ON_THEIR_WAY_BYTES
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _serve()
