"""Adapters of peft on a frozen GPT2 in bf16: plain, with accelerate, and ours with the base in RAM, on a disk, in nf4.

Each trains the same adapters on the same batch in a process of its own, in turns of some steps. Losses are compared
first: plain, accelerate and ours with a whole base, ``==``; a quantised base has other numbers. A step, the peak and
the traffic are what `offload_step` says.

    python scripts/bench lora [--layers 12 --hidden 1024 --budget 200MiB]
"""

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import peers
import report
from offload_step import WARM_UP_TURNS, Row, Training, equal_losses
from worker_process import WorkerError

WORKER = Path(__file__).with_name("lora_worker.py")
PLAIN = "peft, plain"


def rows(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """All trainings by name; ``folder`` is on the disk to use."""
    rank = {"rank": options.rank}
    low = {**rank, "host_memory": options.budget, "quantize": "nf4"}
    on_disk = {**rank, "host_memory": options.budget, "offload_dir": str(folder / "whole")}
    return {
        PLAIN: Row(manager="peft", options=rank, is_same_arithmetic=True),
        "peft, accelerate": Row(manager="peft", options={**rank, "accelerate": True}, is_same_arithmetic=True),
        "ours, base in RAM": Row(manager="our lora", options=rank, is_same_arithmetic=True),
        f"ours, base on disk, {options.budget}": Row(manager="our lora", options=on_disk, is_same_arithmetic=True),
        "ours, base nf4": Row(manager="our lora", options={**rank, "quantize": "nf4"}),
        f"ours, base nf4, on disk, {options.budget}": Row(
            manager="our lora", options={**low, "offload_dir": str(folder / "nf4")}
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--budget", default="120MiB", help="host_memory of the rows with the base on a disk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="in a turn")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to use")
    parser.add_argument("--folder", type=Path, default=peers.DEFAULT_FOLDER, help="for logs")
    parser.set_defaults(untied=False)


def run(options: argparse.Namespace) -> dict[str, object]:
    options.disk.mkdir(parents=True, exist_ok=True)
    errors: dict[str, str] = {}
    trainings: dict[str, Training] = {}
    with ExitStack() as stack:
        asked = rows(options, Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.disk))))
        for name, row in asked.items():
            try:
                training = Training(name, row, options, WORKER)
                stack.callback(training.close)
                for _ in range(WARM_UP_TURNS):
                    training.turn()
                trainings[name] = training
            except WorkerError as error:
                errors[name] = str(error)
        seconds = report.take_turns({name: each.turn for name, each in trainings.items()}, options.repeats)
        results = {name: training.result() for name, training in trainings.items()}
    equal = equal_losses({name: results[name]["losses"] for name in results if asked[name].is_same_arithmetic})
    for name, text in errors.items():
        print(f"{name}: did not run: {text}")
    print(f"losses of a whole base {'are equal, ==' if equal else 'DIFFER'}")
    table = [
        {
            "run": name,
            "ms a step": f"{1e3 * statistics.median(result['step_seconds']):.0f}",
            "to plain": f"{report.ratio(seconds, name, PLAIN):.2f}" if PLAIN in seconds else report.UNKNOWN,
            "peak MiB": f"{result['peak_bytes'] >> 20}",
            "read MB": f"{result['read_bytes'] / 1e6:.0f}",
            "last loss": f"{result['losses'][-1]:.4f}",
        }
        for name, result in results.items()
    ]
    return {"table": table, "ok": equal is not False, "rows": results, "losses_equal": equal, "errors": errors}
