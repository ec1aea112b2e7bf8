"""A training step whose model data are in RAM or on a disk: ours at several budgets, plain PyTorch, FSDP2, DeepSpeed.

All train the same GPT2 of transformers on the same batch, in bf16 with fp32 masters, each in a process of its own, in
turns of some steps; the order changes with each round. A step is what lies between the ends of two backwards. The first
thing compared is the losses: ours and plain PyTorch's with ``==``, as their arithmetic is the same; those of the others
are shown. The peak is what the process had resident at most beyond its imports (VmHWM).

The bound is the larger of computing alone (ours, all in RAM) and the traffic of this row by the disk's rate, reading
and writing at once. That is measured before and after each turn, since a shared disk is twice as fast in one minute as
in another: the median over turns is shown. Traffic is the system's count (``/proc/PID/io``).

    python scripts/bench offload_step                                     95M parameters, all rows: 17 GiB of RAM
    python scripts/bench offload_step --only plain ours                   without peers
    python scripts/bench offload_step --layers 24 --hidden 1024 --budgets 1GiB --only ours 'zero3 nvme'    350M
    python scripts/bench offload_step --tune-nvme                         find DeepSpeed's best setting first
"""

import argparse
import json
import os
import re
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peers
import report
from disk_rate import SECONDS, SPAN_BYTES, mixed_rates
from nvme import BEST, best_setting, zero_options
from worker_process import WorkerError, WorkerProcess

WORKER = Path(__file__).with_name("offload_worker.py")
ROOT = Path(__file__).resolve().parents[2]
PLAIN, RESIDENT, NVME = "plain", "ours", "zero3 nvme"
WARM_UP_TURNS = 2
"""Compiling, the warm-up step of a plan, the first steps by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training of the table."""

    manager: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_same_arithmetic: bool = False
    """Its losses are plain PyTorch's, ``==``."""


def rows(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """All trainings by name; ``folder`` is on the disk to use."""
    untuned = {"batch_size": options.batch_size}
    on_cpu = {"device": "cpu"}
    found = {
        PLAIN: Row(manager="plain", is_same_arithmetic=True),
        RESIDENT: Row(manager="ours", is_same_arithmetic=True),
        **{
            f"ours, {budget}": Row(
                manager="ours",
                options={"host_memory": budget, "offload_dir": str(folder / budget)},
                is_same_arithmetic=True,
            )
            for budget in options.budgets
        },
        "fsdp2 cpu": Row(manager="fsdp2"),
        "zero3 cpu": Row(
            manager="zero3", options={**untuned, "zero": {"offload_optimizer": on_cpu, "offload_param": on_cpu}}
        ),
        NVME: Row(manager="zero3", options={**untuned, **zero_options(options.nvme, folder / "nvme")}),
    }
    return {name: row for name, row in found.items() if not options.only or _is_asked(name, options.only)}


def _is_asked(name: str, only: Sequence[str]) -> bool:
    return any(name == one or name.startswith(f"{one},") for one in only)


class Training:
    """A worker that trains one row."""

    def __init__(self, name: str, row: Row, options: argparse.Namespace, worker: Path = WORKER) -> None:
        asked = {
            "manager": row.manager,
            "options": dict(row.options),
            "model": {
                "n_layer": options.layers, "n_embd": options.hidden, "n_head": max(1, options.hidden // 64),
                "vocab_size": options.vocabulary, "n_positions": options.seq_len,
                "tie_word_embeddings": not options.untied,
            },
            "batch_size": options.batch_size, "length": options.seq_len,
        }  # fmt: skip
        python = peers.install(options.folder) if row.manager == "zero3" else Path(sys.executable)
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()), "TORCH_EXTENSIONS_DIR": str(options.folder / "extensions"),
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        log = options.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.log"
        self._worker = WorkerProcess([python, worker, json.dumps(asked)], environment, log)
        self._steps: int = options.steps
        self.turns: list[dict[str, Any]] = []
        self.begun_at: list[int] = []
        """How many rates had been measured when a turn that counts began."""

    def turn(self) -> float:
        """Some steps; the seconds of one."""
        self.turns.append(self._worker.ask(str(self._steps)))
        return statistics.fmean(self.turns[-1]["seconds"])

    @property
    def losses(self) -> list[float]:
        return [loss for turn in self.turns for loss in turn["losses"]]

    @property
    def counted(self) -> list[dict[str, Any]]:
        """The turns after those that warm up."""
        return self.turns[WARM_UP_TURNS:]

    def rates(self, measured: Sequence[float]) -> list[float]:
        """The disk's rate during each turn that counts: what was measured before and after it."""
        return [statistics.fmean(measured[at - 1 : at + 1]) for at in self.begun_at]

    def result(self) -> dict[str, Any]:
        """Of the turns that count."""
        counted = self.counted
        return {
            "step_seconds": [seconds for turn in counted for seconds in turn["seconds"]],
            "cpu_seconds": [turn["cpu_seconds"] for turn in counted],
            "read_bytes": statistics.fmean(turn["read_bytes"] for turn in counted),
            "written_bytes": statistics.fmean(turn["written_bytes"] for turn in counted),
            "peak_bytes": self.turns[-1]["peak_bytes"],
            "losses": self.losses,
        }

    def close(self) -> None:
        self._worker.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding")
    parser.add_argument("--budgets", nargs="*", default=["330MiB", "200MiB"], help="host_memory of ours, on a disk")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help=f"{RESIDENT} means all budgets, too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to use")
    parser.add_argument("--span", type=int, default=SPAN_BYTES, help="bytes of the file that the disk is measured with")
    parser.add_argument("--nvme", type=json.loads, default=BEST, help="JSON: DeepSpeed's settings for a disk")
    parser.add_argument("--tune-nvme", action="store_true", help="look for faster ones first (minutes)")
    parser.add_argument("--folder", type=Path, default=peers.DEFAULT_FOLDER, help="of the peers' environment")


def run(options: argparse.Namespace) -> dict[str, object]:
    options.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        if options.tune_nvme:
            options.nvme = best_setting(options.nvme, partial(_seconds_of_nvme, options, Path(folder)))
        return {"nvme": options.nvme, **_compare(options, rows(options, Path(folder)))}


def _seconds_of_nvme(options: argparse.Namespace, folder: Path, setting: Mapping[str, Any]) -> float:
    """A step of DeepSpeed with these settings, after one turn that warms up."""
    asked = argparse.Namespace(**{**vars(options), "nvme": setting, "only": [NVME]})
    with ExitStack() as stack:
        training = Training(NVME, rows(asked, folder)[NVME], asked)
        stack.callback(training.close)
        training.turn()
        return training.turn()


def _compare(options: argparse.Namespace, asked: Mapping[str, Row]) -> dict[str, object]:
    errors: dict[str, str] = {}
    rates: list[float] = []
    with ExitStack() as stack:
        measure = stack.enter_context(mixed_rates(options.disk, options.span, SECONDS))
        trainings = dict(_started(asked, options, stack, errors))

        def turn(training: Training) -> float:
            rates.append(measure())
            training.begun_at.append(len(rates))
            return training.turn()

        actions: dict[str, Callable[[], float]] = {name: partial(turn, each) for name, each in trainings.items()}
        report.take_turns(actions, options.repeats)
        rates.append(measure())
        results = {name: training.result() for name, training in trainings.items()}
    equal = equal_losses({name: results[name]["losses"] for name in results if asked[name].is_same_arithmetic})
    alone = statistics.median(results[RESIDENT]["step_seconds"]) if RESIDENT in results else None
    for name, training in trainings.items():
        results[name]["of_bound"] = of_bound(training.counted, training.rates(rates), alone)
    table = _table(options, results, rates, equal)
    for name, text in errors.items():
        print(f"{name}: did not run: {text}")
    return {"table": table, "rows": results, "mixed_bytes_per_second": rates, "losses_equal": equal, "errors": errors}


def _started(
    asked: Mapping[str, Row], options: argparse.Namespace, stack: ExitStack, errors: dict[str, str]
) -> Iterator[tuple[str, Training]]:
    for name, row in asked.items():
        try:
            training = Training(name, row, options)
            stack.callback(training.close)
            for _ in range(WARM_UP_TURNS):
                training.turn()
            yield name, training
        except (WorkerError, peers.PeerError) as error:
            errors[name] = str(error)


def equal_losses(losses: Mapping[str, Sequence[float]]) -> bool | None:
    """True if all are the same; None if there is nothing to compare."""
    each = list(losses.values())
    return all(one == each[0] for one in each[1:]) if len(each) > 1 else None


def of_bound(turns: Sequence[Mapping[str, Any]], rates: Sequence[float], alone: float | None) -> float | None:
    """The median over turns of a step's time to what it takes at least: computing, or its traffic at the disk's rate.

    None if computing is not known.
    """
    if alone is None:
        return None
    ratio: float = statistics.median(
        statistics.fmean(turn["seconds"]) / max(alone, (turn["read_bytes"] + turn["written_bytes"]) / rate)
        for turn, rate in zip(turns, rates, strict=True)
    )
    return ratio


def _table(
    options: argparse.Namespace, results: Mapping[str, Mapping[str, Any]], rates: Sequence[float], equal: bool | None
) -> list[dict[str, str]]:
    print(
        f"{options.layers} x {options.hidden}, vocabulary {options.vocabulary}{', untied' if options.untied else ''}, "
        f"batch {options.batch_size} x {options.seq_len}, {options.threads} threads, {options.repeats} rounds of "
        f"{options.steps} steps"
    )
    print(
        f"disk, reading and writing at once: {statistics.median(rates) / 1e9:.2f} GB/s "
        f"({min(rates) / 1e9:.2f} to {max(rates) / 1e9:.2f})"
    )
    if equal is not None:
        print(f"losses of plain and ours {'are equal, ==' if equal else 'DIFFER'}")
    base = results.get(PLAIN)
    table = []
    for name, result in results.items():
        seconds = statistics.median(result["step_seconds"])
        ratio = result["of_bound"]
        table.append(
            {
                "run": name,
                "ms a step": f"{1e3 * seconds:.0f}",
                "low": f"{1e3 * min(result['step_seconds']):.0f}",
                "to plain": report.UNKNOWN
                if base is None
                else f"{seconds / statistics.median(base['step_seconds']):.2f}",
                "of bound": report.UNKNOWN if ratio is None else f"{ratio:.2f}",
                "read GB": f"{result['read_bytes'] / 1e9:.2f}",
                "written GB": f"{result['written_bytes'] / 1e9:.2f}",
                "peak MiB": f"{result['peak_bytes'] >> 20}",
                "last loss": f"{result['losses'][-1]:.4f}",
            }
        )
    return table
