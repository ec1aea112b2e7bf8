"""Training steps with several ranks: ours, FSDP2 and DeepSpeed's ZeRO-3, each rank in a process of its own.

All train the same GPT2 on the same batches, one thread a rank, over Gloo. Each peer is compared with the base alone,
so that memory is needed for two trainings at a time: the two take turns of some steps, and the ratio is the median over
the rounds of (peer) / (base). A turn ends when nothing of its last step is under way. The time that processors worked
for a step, all ranks together, says the same with less noise where other programs want them, too.

Memory is what a rank took beyond its imports and a throw-away step. Peak: the most that one rank had resident
(VmHWM), from building to the last step. Together: the most that all ranks had, with shared pages counted once (the sum
of their Pss, read while they train some further steps). Received: bytes over TCP, a rank and step.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peers
import psutil
import report
from ranks_worker import KINDS

WORKER = Path(__file__).with_name("ranks_worker.py")
ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3
"""Compiling, the warm-up step of a plan, the first step by it."""
PSS_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one kind of training took and gave."""

    seconds: list[float]
    """Of a step, a turn each; that of the slowest rank."""
    cpu_seconds: list[float]
    """Of a step, a turn each; of all ranks together."""
    losses: list[float]
    """Of each step, the mean over the ranks."""
    peak_bytes: int
    """Resident beyond the imports, of the rank that had most."""
    set_up_peak_bytes: int
    """The same until the first step."""
    together_bytes: int
    """Of all ranks, shared pages counted once."""
    received_bytes: int
    """A rank and step."""
    model_data_bytes: int | None
    """Of the rank that has most, by the manager's own count, if it has one."""


class Ranks:
    """The ranks of one training, each a worker process.

    Parameters
    ----------
    kind
        One of `KINDS`.
    python
        Interpreter of the environment that this kind needs.
    world
        Number of ranks.
    options
        Size of model and batch; see `add_arguments`.

    Raises
    ------
    peers.PeerError
        If a rank ends; here and in `turn`.
    """

    def __init__(self, kind: str, python: Path, world: int, options: argparse.Namespace) -> None:
        fields = {
            "n_layer": options.layers, "n_embd": options.hidden, "n_head": options.hidden // 64,
            "vocab_size": options.vocabulary, "n_positions": options.seq_len,
        }  # fmt: skip
        command = [python, WORKER, kind, json.dumps(fields), str(options.batch_size), str(options.seq_len)]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "TORCH_EXTENSIONS_DIR": str(options.folder / "extensions"),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        name = "".join(c for c in kind if c.isalnum() or c == " ")
        options.folder.mkdir(parents=True, exist_ok=True)
        self._logs = [(options.folder / f"{name} rank {rank}.log").open("w+") for rank in range(world)]
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, log in enumerate(self._logs)
        ]  # fmt: skip
        self._answers()
        for process in self._processes:
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # forget the peak of importing
        self._imports = [_resident(process.pid, "VmRSS") for process in self._processes]
        self._imports_together = self._pss()
        self._losses: list[float] = []
        self._cpu_seconds: list[float] = []
        self._received = 0.0
        self._model_data = [answer["model_data_bytes"] for answer in self._ask("build")]
        self._set_up_peak = self.peak_bytes()

    def turn(self, steps: int) -> float:
        """Train; the seconds of a step."""
        before = self._cpu()
        answers = self._ask(str(steps))
        self._cpu_seconds.append((self._cpu() - before) / steps)
        self._losses += [statistics.fmean(each) for each in zip(*(a["losses"] for a in answers), strict=True)]
        self._received = statistics.fmean(answer["received_bytes"] for answer in answers)
        seconds: float = max(answer["seconds"] for answer in answers)
        return seconds

    def peak_bytes(self) -> int:
        """Resident beyond the imports, at most so far, of the rank that had most."""
        peaks = [_resident(process.pid, "VmHWM") for process in self._processes]
        return max(peak - before for peak, before in zip(peaks, self._imports, strict=True))

    def measured(self, seconds: list[float]) -> Measured:
        """All that is known after the turns; trains some more steps to see the memory of all ranks together."""
        model_data = [each for each in self._model_data if each is not None]
        values = Measured(
            seconds=seconds, cpu_seconds=self._cpu_seconds[-len(seconds) :], losses=list(self._losses),
            peak_bytes=self.peak_bytes(), set_up_peak_bytes=self._set_up_peak,
            received_bytes=round(self._received), model_data_bytes=max(model_data, default=None),
            together_bytes=self._together_bytes(),
        )  # fmt: skip
        return values

    def _together_bytes(self) -> int:
        samples: list[int] = []
        over = threading.Event()

        def sample() -> None:
            while not over.is_set():
                samples.append(self._pss())
                time.sleep(PSS_SECONDS)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            self._ask("3")
        finally:
            over.set()
            sampler.join()
        return max(samples) - self._imports_together

    def _pss(self) -> int:
        return sum(_proportional(process.pid) for process in self._processes)

    def _cpu(self) -> float:
        return sum(sum(psutil.Process(process.pid).cpu_times()[:2]) for process in self._processes)

    def _ask(self, line: str) -> list[dict[str, Any]]:
        for process in self._processes:
            assert process.stdin is not None
            try:
                print(line, file=process.stdin, flush=True)
            except BrokenPipeError:
                break  # it has ended; its log says why
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log = self._logs[rank]
                log.seek(0)
                self.kill()
                raise peers.PeerError(f"rank {rank} ended: {log.read().strip()[-1500:]}")
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """End all ranks; at first those that end by themselves."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        try:
            for process in self._processes:
                process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _resident(pid: int, field: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) << 10


def _proportional(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1, help="of a rank")
    parser.add_argument("--world", type=int, default=2, help="number of ranks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--base", choices=KINDS, default="ours")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="to compare with the base")
    parser.add_argument("--folder", type=Path, default=peers.DEFAULT_FOLDER, help="of the peers' environment")


def run(options: argparse.Namespace) -> dict[str, object]:
    kinds = [kind for kind in options.kinds if kind != options.base]
    print(f"{options.world} ranks, a batch of {options.batch_size} x {options.seq_len} each, one thread each")
    rows: dict[str, list[dict[str, object]]] = {}
    errors: dict[str, str] = {}
    table: list[dict[str, str]] = []
    for kind in kinds or [options.base]:
        try:
            pair = compare(list(dict.fromkeys([options.base, kind])), options)
        except peers.PeerError as error:
            errors[kind] = str(error)
            print(f"{kind}: did not run: {error}")
            continue
        for name, row in pair.items():
            ratio = report.ratio({n: r.seconds for n, r in pair.items()}, name, options.base)
            cpu_ratio = report.ratio({n: r.cpu_seconds for n, r in pair.items()}, name, options.base)
            rows.setdefault(name, []).append({"beside": kind, "ratio": ratio, "cpu_ratio": cpu_ratio, **asdict(row)})
            table.append(_shown(name, kind, ratio, cpu_ratio, row))
    return {"table": table, "rows": rows, "errors": errors}


def compare(kinds: list[str], options: argparse.Namespace) -> dict[str, Measured]:
    """Train each kind, in turns."""
    trainings: dict[str, Ranks] = {}
    try:
        for kind in kinds:
            python = peers.install(options.folder) if kind.startswith("ZeRO") else Path(sys.executable)
            trainings[kind] = Ranks(kind, python, options.world, options)
            trainings[kind].turn(WARM_UP)
        turns = {kind: lambda ranks=ranks: ranks.turn(options.steps) for kind, ranks in trainings.items()}
        seconds = report.take_turns(turns, options.rounds)
        return {kind: ranks.measured(seconds[kind]) for kind, ranks in trainings.items()}
    finally:
        for ranks in trainings.values():
            ranks.close()


def _shown(name: str, beside: str, ratio: float, cpu_ratio: float, row: Measured) -> dict[str, str]:
    data = report.UNKNOWN if row.model_data_bytes is None else str(row.model_data_bytes >> 20)
    return {
        "run": name,
        "beside": beside,
        "ms a step": f"{1e3 * statistics.median(row.seconds):.0f}",
        "ratio": f"{ratio:.2f}",
        "CPU ms": f"{1e3 * statistics.median(row.cpu_seconds):.0f}",
        "CPU ratio": f"{cpu_ratio:.2f}",
        "peak MiB": str(row.peak_bytes >> 20),
        "set-up": str(row.set_up_peak_bytes >> 20),
        "together": str(row.together_bytes >> 20),
        "received": str(row.received_bytes >> 20),
        "model data": data,
        "losses": " ".join(f"{loss:.4f}" for loss in row.losses[:WARM_UP] + row.losses[-1:]),
    }
