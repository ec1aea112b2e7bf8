"""Several ranks write into one folder, without asking each other where that is."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from stat_runs import RUN_ID, job_of, open_run

from gemini.telemetry.job import Job, find_job
from gemini.telemetry.layout import records_file, start_file
from gemini.telemetry.reader import read_run
from gemini.telemetry.run_status import RunStatus

TESTS = Path(__file__).resolve().parents[2]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8"}
SRUN = {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_START_TIME": "1767225600",
}
STEP = "20260101T000000Z-4711-2"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Job(attempt="0")),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Job(rank=3, world_size=4, attempt="0")),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, Job(attempt="0")),
        (SRUN, Job(rank=11, world_size=16, run_id=STEP, attempt="0")),
        ({**SRUN, "SLURM_RESTART_COUNT": "3"}, Job(rank=11, world_size=16, restart=3, run_id=STEP, attempt="3")),
        ({**SRUN, "RANK": "11", "WORLD_SIZE": "16"}, Job(rank=11, world_size=16, run_id=STEP, attempt="0")),
        ({**SRUN, "SLURM_JOB_START_TIME": ""}, Job(rank=11, world_size=16, attempt="0")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "4711"}, Job(attempt="0")),  # a batch script
        ({"RANK": "-1", "WORLD_SIZE": "many", "TORCHELASTIC_RESTART_COUNT": "9" * 40}, Job(attempt="0")),
    ],
)
def test_the_launcher_says_who_trains(environ: Mapping[str, str], expected: Job, tmp_path: Path) -> None:
    assert find_job(environ, tmp_path) == expected


def test_ranks_of_one_torchrun_name_their_run_by_it(tmp_path: Path) -> None:
    parent = tmp_path / str(os.getppid())
    parent.mkdir()
    fields = ["S", *["0"] * 18, str(100 * os.sysconf("SC_CLK_TCK"))]
    (parent / "stat").write_text(f"{os.getppid()} (a (b) c) {' '.join(fields)}\n")
    (tmp_path / "stat").write_text("cpu 1\nbtime 1767225500\n")
    restarted = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1", **SRUN}  # srun started torchrun
    run_id = f"20260101T000000Z-{os.getppid()}"
    assert find_job(TORCHRUN, tmp_path) == Job(rank=5, world_size=8, run_id=run_id, attempt="0")
    assert find_job(restarted, tmp_path) == Job(rank=5, world_size=8, restart=1, run_id=run_id, attempt="1")


CHILD = """
import os, sys
sys.path.insert(0, {tests!r})
from stat_runs import job_of, open_run
{body}
"""


def child(body: str, **environment: str) -> "subprocess.Popen[str]":
    code = CHILD.format(tests=str(TESTS), body=body)
    environ = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)


def outputs_of(*children: "subprocess.Popen[str]") -> list[str]:
    return [each.communicate(timeout=120)[0].strip() for each in children]


def test_ranks_that_one_torchrun_started_share_a_folder() -> None:
    body = (
        "from gemini.telemetry.writer import TelemetryWriter\n"
        "w = TelemetryWriter()\nw.record_step({'step/count': 1})\nprint(w.run_dir)\nw.close()\n"
    )
    shared = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}
    (folder,) = set(outputs_of(*(child(body, **shared, RANK=str(rank)) for rank in range(4))))
    assert [records_file(Path(folder), rank).exists() for rank in range(4)] == [True] * 4


def test_ranks_of_a_process_group_agree_on_a_name_by_its_store() -> None:
    """As on two machines, whose ranks have no parent in common."""
    body = (
        "import torch.distributed as dist\nfrom gemini.monitor.job import this_job\n"
        "dist.init_process_group('gloo')\n"
        "rank = dist.get_rank()\n"
        "if rank == 1: dist.barrier()\n"  # rank 0 has asked then, and has not waited for it
        "job = this_job()\n"
        "if rank == 0: dist.barrier()\n"
        "print(job.rank, job.world_size, job.run_id, job.attempt, flush=True)\ndist.barrier()\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = outputs_of(*(child(body, **address, RANK=str(rank)) for rank in range(2)))
    assert first.split()[:2] == ["0", "2"] and second.split()[:2] == ["1", "2"]
    assert first.split()[2:] == second.split()[2:]


@pytest.mark.parametrize("is_chosen", [False, True])
def test_a_second_run_of_the_ranks_has_a_name_of_its_own(is_chosen: bool, tmp_path: Path) -> None:
    chosen = tmp_path / "run" if is_chosen else None
    writers, names = [], []
    for rank in (0, 1) * 2:
        writers.append(open_run(3, chosen, rank, 2))
        folder = writers[-1].run_dir
        assert folder is not None and (not is_chosen or folder == chosen)
        names.append(json.loads(start_file(folder, rank).read_text())["run_id"])
    assert names == [RUN_ID, RUN_ID, f"{RUN_ID}-2", f"{RUN_ID}-2"]
    for writer in writers:
        writer.close()


def test_a_restarted_rank_starts_anew_in_the_same_folder() -> None:
    (folder,) = outputs_of(child("w = open_run(50, None, 0, 2)\nprint(w.run_dir)\nw.close('crashed')\n"))
    writer = open_run(3, None, 0, 2, restart=1)
    assert str(writer.run_dir) == folder
    found = read_run(Path(folder), 0)
    assert (found.step, found.status, found.identity.run_id) == (3, RunStatus.RUNNING, RUN_ID)
    writer.close()


def test_a_rank_says_who_writes_its_records_now() -> None:
    writer = open_run(1, None, 1, 2)
    assert writer.run_dir is not None
    start = json.loads(start_file(writer.run_dir, 1).read_text())
    assert (start["rank"], start["pid"], start["run_id"]) == (1, os.getpid(), RUN_ID)
    assert start["restart"] == job_of(1, 2).restart == 0
    writer.close()
