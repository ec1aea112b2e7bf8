"""Other people's Adam kernels, installed from their registry packages into an environment of their own, run for real.

The environment sees our torch and nothing else of ours. Its worker process (`peer_worker.py`) runs one repetition
when asked for one, so that peers take turns with us although they live in another process.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import torch

DEFAULT_FOLDER = Path.home() / ".cache" / "gemini-memory" / "bench-peers"
WORKER = Path(__file__).with_name("peer_worker.py")

# What DeepSpeed's Adam needs to be imported and built; the rest of its requirements it does not touch.
DEEPSPEED = ["deepspeed", "einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "pydantic", "tqdm"]


class PeerError(Exception):
    """A peer could not be installed, built or run; the text is its own error."""


def install(folder: Path) -> Path:
    """Make the environment, or take the one that is there; its interpreter.

    Raises
    ------
    PeerError
        If the environment itself cannot be made. A package that does not install is told by the worker.
    """
    python = folder / "bin" / "python"
    try:
        if not (folder / "complete").exists():
            print(f"installing peers into {folder} (once)", file=sys.stderr)
            venv.create(folder, with_pip=True)
        # Each time: the environment that it was made with may be gone.
        purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        (purelib / "outer-environment.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"no environment in {folder}: {error}") from error
    if (folder / "complete").exists():
        return python
    failed = [_pip(python, "install", "--no-build-isolation", *DEEPSPEED)]
    failed.append(_unpack_colossal(python, folder))
    (folder / "installed.json").write_text(json.dumps([error for error in failed if error]))
    (folder / "complete").touch()
    return python


def _pip(python: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return None if done.returncode == 0 else f"pip {' '.join(arguments)}: {done.stderr.strip()[-2000:]}"


def _unpack_colossal(python: Path, folder: Path) -> str | None:
    """ColossalAI's sources only: installing it asks for a torch older than ours, and its kernel needs nothing of it."""
    error = _pip(python, "download", "--no-deps", "--no-build-isolation", "-d", str(folder / "src"), "colossalai")
    if error is None:
        (archive,) = (folder / "src").glob("colossalai-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "src", filter="data")
    return error


class Peers:
    """The worker process, for one number of threads.

    Parameters
    ----------
    python
        Interpreter of the environment that `install` made.
    folder
        Where it is; compiled kernels are kept there.
    memory, numel
        The buffers: a descriptor of `buffers.create`, and their length.
    threads
        OpenMP threads.
    """

    def __init__(self, python: Path, folder: Path, memory: int, numel: int, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
            "DS_ACCELERATOR": "cpu",
            "DS_SKIP_CUDA_CHECK": "1",
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        for lock in folder.glob("extensions/**/lock"):
            lock.unlink()  # torch's builder leaves it behind when it is killed, and the next one waits for it for ever
        self._log = (folder / "worker.log").open("w+")
        self._process = subprocess.Popen(
            [python, WORKER, str(folder), str(memory), str(numel)], pass_fds=[memory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        ready = self._answer()
        self.names: list[str] = ready["names"]
        self.errors: dict[str, str] = ready["errors"]
        self.versions: dict[str, str] = ready["versions"]

    def run(self, name: str) -> float:
        """One repetition; its seconds."""
        assert self._process.stdin is not None
        print(name, file=self._process.stdin, flush=True)
        seconds: float = self._answer()["seconds"]
        return seconds

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise PeerError(f"the peers' process ended: {self._log.read()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._log.close()
