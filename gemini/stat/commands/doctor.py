"""``gemini-stat doctor``: what this machine and this installation can do, and what is wrong with them."""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import psutil

from gemini import __version__
from gemini.cores import cpu_quota, usable_cores
from gemini.safe_files import make_own_folder
from gemini.stat.console import Exit, print_json
from gemini.stat.outputs import Finding, Findings
from gemini.stat.rates import hardware_file, read_hardware
from gemini.stat.text import printable, size
from gemini.telemetry.layout import runs_folder

HELP = "Checks versions, limits, folders and what telemetry costs here; exits 3 if something is wrong."
_PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "rich",
    "psutil",
    "msgspec",
    "safetensors",
    "transformers",
    "prometheus-client",
    "nvidia-ml-py",
)
_SLOW_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "cifs", "fuse.sshfs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> Exit:
    findings = list(_findings())
    if options.json:
        print_json(Findings(all(item.ok for item in findings), findings))
    else:
        width = max(len(item.name) for item in findings)
        for item in findings:
            mark = "ok" if item.ok else "!!"
            print(f" {mark}  {item.name:<{width}}  {item.text}")
            if item.hint:
                print(f"     {'':<{width}}  {item.hint}")
    return Exit.OK if all(item.ok for item in findings) else Exit.NEGATIVE


def _finding(name: str, text: str, ok: bool = True, hint: str = "") -> Finding:
    return Finding(name, printable(text), ok, None if ok else hint)


def _findings() -> Iterator[Finding]:
    versions = {name: _version(name) for name in _PACKAGES}
    yield _finding("gemini-memory", f"{__version__}, Python {sys.version.split()[0]}")
    yield _finding("packages", ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    yield _finding("torch", versions["torch"] or "not installed", versions["torch"] is not None, "install torch")
    yield _device()
    memory = psutil.virtual_memory()
    yield _finding("RAM", f"{size(memory.available)} of {size(memory.total)} available")
    yield _cgroup(memory.total)
    yield _locked_memory()
    yield _threads()
    yield _disk()
    yield _run_folder()
    yield _overhead()
    links = read_hardware()
    shown = ", ".join(f"{name.replace('_', ' ')} {size(value)}/s" for name, value in sorted(links.items()))
    yield _finding("bandwidths", shown or f"not measured; gemini-stat bench FOLDER writes {hardware_file()}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device() -> Finding:
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names = [
                f"{_text(pynvml.nvmlDeviceGetName(h))} {size(pynvml.nvmlDeviceGetMemoryInfo(h).total)}" for h in handles
            ]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML's errors are many: no library, no driver, no permission
        return _finding("device", "no NVIDIA driver: units run on the CPU")
    return _finding("device", ", ".join(names) or "a driver without a GPU")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cgroup(total: int) -> Finding:
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < total:
            return _finding("cgroup", f"limits RAM to {size(int(text))} ({file}); budgets follow it")
    return _finding("cgroup", "no limit below the RAM")


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    has_driver = Path("/proc/driver/nvidia").exists()
    text = "unlimited" if soft == resource.RLIM_INFINITY else size(soft)
    small = soft != resource.RLIM_INFINITY and soft < 1 << 30
    return _finding(
        "locked memory", text, not (has_driver and small), "raise it (ulimit -l unlimited) or transfers are slow"
    )


def _threads() -> Finding:
    try:
        fair, quota = usable_cores(), cpu_quota()
    except ValueError as error:
        return _finding("threads", str(error), False, "the launcher sets it; unset it where there is none")
    asked = os.environ.get("OMP_NUM_THREADS")
    # Unset, torch takes every core of the affinity: too many under a quota, which the affinity does not show.
    taken = (
        int(asked) if asked is not None and asked.isdecimal() else max(fair, min(len(os.sched_getaffinity(0)), 1024))
    )
    limited = "" if quota is None else f", a CPU quota of {quota:g}"
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or 1
    text = f"{fair} for this rank of {ranks}{limited}, OMP_NUM_THREADS={asked or 'unset'}"
    why = "computing on CPU leaves cores idle" if taken < fair else "more threads than cores stop each other"
    return _finding("threads", text, taken == fair, f"{why}: set OMP_NUM_THREADS={fair}")


def _disk() -> Finding:
    folder = Path(tempfile.gettempdir())
    usage = shutil.disk_usage(folder)
    kind = _file_system(folder)
    text = f"{folder} is {kind}, {size(usage.free)} free"
    return _finding("temporary folder", text, kind != "tmpfs", "it is RAM: give offload_dir a folder on a disk")


def _file_system(folder: Path) -> str:
    found = ("", "unknown")
    for part in psutil.disk_partitions(all=True):
        if folder == Path(part.mountpoint) or Path(part.mountpoint) in folder.parents:
            found = max(found, (part.mountpoint, part.fstype), key=lambda item: len(item[0]))
    return found[1]


def _run_folder() -> Finding:
    folder = runs_folder()
    try:
        make_own_folder(folder, ours=2)
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return _finding(
            "run folder", f"{folder}: {error}", False, "set XDG_STATE_HOME, or GeminiPlugin(telemetry=FOLDER)"
        )
    kind = _file_system(folder)
    ok = free > 1 << 30
    note = "; locks do not tell across hosts, heartbeats do" if kind in _SLOW_FILE_SYSTEMS else ""
    return _finding(
        "run folder", f"{folder} on {kind}, {size(free)} free{note}", ok, "telemetry stops when the disk is full"
    )


def _overhead() -> Finding:
    """Hand over records as training does, into a folder that goes away."""
    from gemini.telemetry.writer import TelemetryWriter

    stats = {f"self_test/{i}": float(i) for i in range(50)}
    with tempfile.TemporaryDirectory() as folder:
        writer = TelemetryWriter(Path(folder) / "run", is_listed=False, min_interval_seconds=0.0)
        taken = []
        for _ in range(200):
            begin = time.perf_counter()
            writer.record_step(lambda: stats)
            taken.append(time.perf_counter() - begin)
        writer.close()
    median = sorted(taken)[len(taken) // 2]
    hint = "the machine is very busy; scripts/bench telemetry measures whole steps"
    return _finding("telemetry", f"{1e6 * median:.1f} us to hand over a record", median < 20e-6, hint)
