"""Compiles the simulated device once per source, torch and compiler, into the user's cache folder."""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SOURCES = Path(__file__).parent / "device"
BUILD_SECONDS = 300
FLAGS = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared")


class Unavailable(Exception):
    """The simulated device cannot be built here; the message says why."""


@lru_cache(maxsize=1)
def library() -> Path:
    """The compiled device. Several processes may ask at once: one builds, the others wait.

    Raises
    ------
    Unavailable
        Where there is no C++ compiler. One that is there and fails is a `RuntimeError` with what it said.
    """
    command = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if command is None:
        raise Unavailable("the simulated device needs a C++ compiler: install g++, or name one in CXX")
    compiler = shlex.split(command)
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"device-{_key(compiler)}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(compiler, built)
    return built


def _compile(compiler: list[str], built: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    draft = built.with_suffix(f".{os.getpid()}.draft")
    arguments = [
        *compiler, *FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in include_paths()), str(SOURCES / "device.cpp"), "-o", str(draft),
        f"-L{libraries}", "-lc10", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=BUILD_SECONDS)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(arguments)}\n{done.stderr[-4000:]}")
        draft.rename(built)
    finally:
        draft.unlink(missing_ok=True)


def _key(compiler: list[str]) -> str:
    """Changes with everything that the result depends on."""
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    found = hashlib.sha256("\0".join([torch.__version__, torch.__file__, told, *FLAGS]).encode())
    for source in sorted(SOURCES.iterdir()):
        found.update(source.read_bytes())
    return found.hexdigest()[:16]


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    return root / "gemini-memory" / "simulated-device"
