"""Saving and loading against safetensors and torch, of the same bytes, by turns.

Ours saves a boosted model and its optimizer. The peers have the same values as plain tensors in RAM. They save them
with one call and an fsync into a new file, which then takes the place of the old one, as ours do; and they copy what
they load into these tensors, as ``load_state_dict`` does. Files are loaded cold, after the kernel has dropped its copy
of them (``POSIX_FADV_DONTNEED``), and warm.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import report
import safetensors.torch
import torch
from torch import Tensor, nn

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam

OURS, SAFETENSORS, TORCH = "ours", "safetensors", "torch"
Actions = Mapping[str, Callable[[], float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--millions", type=int, default=300, help="parameters")
    parser.add_argument("--frozen", action="store_true", help="no optimizer, weights in bf16")
    parser.add_argument("--host-memory", help="what the chunks may take of RAM; the rest goes to disk")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where files and chunks on disk go")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=[SAFETENSORS, TORCH], choices=[SAFETENSORS, TORCH])
    parser.add_argument("--only", nargs="*", default=["model", "optimizer"], choices=["model", "optimizer"])


def run(arguments: argparse.Namespace) -> dict[str, object]:
    folder = Path(tempfile.mkdtemp(prefix="gemini-memory-bench-", dir=arguments.folder))
    try:
        booster, model, optimizer = _boosted(arguments, folder)
        rows = []
        if "model" in arguments.only:
            rows += _rows("model", _OfModel(booster, model), folder, arguments)
        if "optimizer" in arguments.only and optimizer is not None:
            rows += _rows("optimizer", _OfOptimizer(booster, optimizer), folder, arguments)
        table = [
            {
                "what": str(row["what"]),
                "GB": f"{row['bytes'] / 1e9:.2f}",
                "doing": str(row["doing"]),
                "by": str(row["name"]),
                "GB/s": f"{row['bytes'] / statistics.median(row['seconds']) / 1e9:.2f}",
                "ours / this": f"{row['ours_to_this']:.2f}",
            }
            for row in rows
        ]
        return {"table": table, "rows": rows}
    finally:
        shutil.rmtree(folder)


class _OfModel:
    def __init__(self, booster: Booster, model: Any) -> None:
        self.save = lambda folder: booster.save_model(model, folder)
        self.load = lambda folder: booster.load_model(model, folder)
        self.state_dict: Callable[[], dict[str, Tensor]] = model.state_dict


class _OfOptimizer:
    def __init__(self, booster: Booster, optimizer: Any) -> None:
        self.save = lambda folder: booster.save_optimizer(optimizer, folder)
        self.load = lambda folder: booster.load_optimizer(optimizer, folder)
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Tensor]:
        state = self._optimizer.state_dict()["state"]
        return {f"{i}.{name}": v for i, each in state.items() for name, v in each.items() if name != "step"}


def _rows(what: str, ours: Any, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    values = ours.state_dict()
    nbytes = sum(value.nbytes for value in values.values())
    files = {name: folder / f"{what}-{name}" for name in (OURS, *arguments.peers)}
    files[OURS].mkdir()
    saves: dict[str, Callable[[], object]] = {OURS: lambda: ours.save(files[OURS])}
    loads: dict[str, Callable[[], object]] = {OURS: lambda: ours.load(files[OURS])}
    if SAFETENSORS in arguments.peers:
        saves[SAFETENSORS] = lambda: _synced(safetensors.torch.save_file, values, files[SAFETENSORS])
        loads[SAFETENSORS] = lambda: _copy(safetensors.torch.load_file(files[SAFETENSORS]), values)
    if TORCH in arguments.peers:
        saves[TORCH] = lambda: _synced(torch.save, values, files[TORCH])
        loads[TORCH] = lambda: _copy(torch.load(files[TORCH], mmap=True), values)
    rows = []
    for doing, actions in (("save", saves), ("load, cold", loads), ("load, warm", loads)):
        prepare = {name: _preparation(doing, files[name]) for name in actions}
        timed = {name: _after(prepare[name], report.timed(action)) for name, action in actions.items()}
        if doing == "save":
            for action in timed.values():
                action()
        seconds = report.take_turns(timed, arguments.rounds)
        for name in actions:
            ratio = report.ratio(seconds, OURS, name)
            row = {"what": what, "doing": doing, "bytes": nbytes, "name": name}
            rows.append({**row, "seconds": seconds[name], "ours_to_this": ratio})
    return rows


def _preparation(doing: str, path: Path) -> Callable[[], None]:
    if doing == "save":
        return os.sync  # what others have written is not to be written in the time of this
    return (lambda: _drop(path)) if doing == "load, cold" else (lambda: _read(path))


def _after(prepare: Callable[[], None], action: Callable[[], float]) -> Callable[[], float]:
    def run() -> float:
        prepare()
        return action()

    return run


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _drop(path: Path) -> None:
    for file in _files(path):
        with _opened(file) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    buffer = bytearray(1 << 20)
    for file in _files(path):
        with _opened(file) as fd:
            while os.readv(fd, [buffer]):
                pass


def _synced(save: Callable[..., None], values: dict[str, Tensor], path: Path) -> None:
    new = path.with_suffix(".new")
    save(values, new)
    with _opened(new) as fd:
        os.fsync(fd)
    new.replace(path)


def _copy(loaded: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            value.copy_(loaded[name])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, _, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(q) + self.down(self.up(v))


def _boosted(arguments: argparse.Namespace, folder: Path) -> tuple[Booster, Any, Any]:
    """A model with the tensors of a GPT (vocabulary 50257), whose states are what one step leaves."""
    width = 1024 if arguments.millions < 700 else 2048
    depth = max(1, round((arguments.millions * 1e6 - 50257 * width) / (12 * width * width)))
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(50257, width), *(_Block(width) for _ in range(depth)))
    optimizer = None
    if arguments.frozen:
        model.to(torch.bfloat16).requires_grad_(False)
    else:
        optimizer = HybridAdam(model.parameters(), lr=1e-4)
    plugin = GeminiPlugin(
        precision="bf16", telemetry=False, host_memory=arguments.host_memory,
        offload_dir=folder if arguments.host_memory else None,
    )  # fmt: skip
    booster = Booster(plugin=plugin)
    model, optimizer, *_ = booster.boost(model, optimizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters", flush=True)
    if optimizer is not None:
        booster.backward(model(torch.arange(8)).float().square().mean(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return booster, model, optimizer
