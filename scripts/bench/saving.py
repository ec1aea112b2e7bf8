"""Saving a model and its optimizer on several ranks: ours in both layouts, FSDP2 with torch's `dcp.save`, plain writes.

All save the same GPT2 with Adam's states, fp32, to the same folder in turns, in the same processes; each is forced to
the disk. A time is that of the slowest rank, from one barrier to the next; the ratios are medians over the rounds of
(ours) / (FSDP2) in the same round, because a disk is not as fast all the time. The plain write is that of as many bytes
in one file for each rank, with fsync: nothing can be faster.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("saving_worker.py")
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk that is measured")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    results, table = {}, []
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rounds = _rounds(ranks, folder, arguments)
        nbytes = rounds[0]["bytes"]
        print(f"{ranks} rank{'s' * (ranks > 1)}, {nbytes / 1e6:.0f} MB, {len(rounds)} rounds")
        kinds = [kind for kind in rounds[0] if kind != "bytes"]
        for kind in kinds:
            seconds = [each[kind] for each in rounds]
            ratio = statistics.median(each[kind] / each["FSDP2 + dcp.save"] for each in rounds)
            table.append(
                {
                    "saving": f"{kind}, {ranks} rank{'s' * (ranks > 1)}",
                    "seconds": f"{statistics.median(seconds):.2f}",
                    "of FSDP2 + dcp.save": f"{ratio:.2f}",
                }
            )
        results[ranks] = rounds
    return {"table": table, "seconds": results}


def _rounds(ranks: int, folder: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sizes = json.dumps({"n_layer": arguments.layers, "n_embd": arguments.hidden, "n_head": arguments.hidden // 64})
    command = [sys.executable, str(WORKER), folder, sizes, str(arguments.rounds)]
    workers = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a rank has failed; see above")
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith(b"{")]
