"""A step that is bound by the disk, phase by phase: when the disk works, when the units compute, who waits.

Each row of the picture is one kind of work over the time of one step, a column a fiftieth of it: blank, ``.`` (some),
``o`` (half) or ``#`` (all of that time). Below it: seconds of each phase, in which of them the disk works, the bytes,
and the two bounds of the step: computing alone, and moving the bytes at the disk's mixed rate.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from gemini.boosted import boosted
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk.disk_file import DiskFile, Requests
from gemini.updates.update_pipeline import Block

COLUMNS = 50
MIB = 1 << 20
RATE_BYTES = 256 * MIB
TURN = 5
"""Steps that a model takes before the next one's turn. The first is not counted: the updates before it are over."""
PHASES = ("forward", "backward", "step")
Span = tuple[float, float]


@dataclass
class Recording:
    """Spans of time by the kind of work, bytes by the direction."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    nbytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, begin: float, nbytes: int = 0) -> None:
        self.spans.setdefault(kind, []).append((begin, time.perf_counter()))
        self.nbytes[kind] = self.nbytes.get(kind, 0) + nbytes

    def clear(self) -> None:
        self.spans.clear()
        self.nbytes.clear()


@contextmanager
def recorded(recording: Recording) -> Iterator[None]:
    """Note each read and write of the disk tier, each block that is updated, and each unit that waits."""
    from gemini.engine.engine import Engine

    def timed(kind: str, method: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                recording.add(kind, begin, size(*arguments))

        return call

    kept = DiskFile._read, DiskFile._write, Block.compute, Engine.enter
    DiskFile._read = timed("read", DiskFile._read, lambda _, request, what: request.nbytes)
    DiskFile._write = timed("write", DiskFile._write, lambda _, request, what: request.nbytes)
    Block.compute = timed("update", Block.compute, lambda *_: 0)
    Engine.enter = timed("enter", Engine.enter, lambda *_: 0)
    try:
        yield
    finally:
        DiskFile._read, DiskFile._write, Block.compute, Engine.enter = kept


def union(spans: Sequence[Span], begin: float, end: float) -> float:
    """Seconds of ``[begin, end]`` that at least one span covers."""
    covered, at = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, at), min(last, end)
        if last > first:
            covered += last - first
            at = last
    return covered


def row(spans: Sequence[Span], begin: float, end: float) -> str:
    width = (end - begin) / COLUMNS
    shares = [union(spans, begin + i * width, begin + (i + 1) * width) / width for i in range(COLUMNS)]
    return "".join(" .o#"[min(3, int(share * 3 + 0.9))] if share > 0.02 else " " for share in shares)


def mixed_rate(folder: Path, nbytes: int, depth: int = 8, block: int = 1 << 20) -> float:
    """Bytes a second with half of the requests reads and half writes."""
    import mmap
    from concurrent.futures import ThreadPoolExecutor

    file = DiskFile(folder, Requests(block, 1))
    memory = torch.frombuffer(mmap.mmap(-1, depth * block), dtype=torch.uint8).fill_(1)
    try:
        file.reserve(0, 2 * nbytes)
        for at in range(0, 2 * nbytes, block):
            file.write(at, memory.data_ptr(), block, "a measurement")

        def lane(index: int) -> None:
            address = memory.data_ptr() + index * block
            for at in range(index * block, nbytes, depth * block):
                if index % 2:
                    file.read(at, address, block, "a measurement")
                else:
                    file.write(nbytes + at, address, block, "a measurement")

        begin = time.perf_counter()
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(lane, range(depth)))
        return nbytes / (time.perf_counter() - begin)
    finally:
        file.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--host-memory", default="330MiB")
    parser.add_argument("--untied", action="store_true", help="an embedding and a head of their own")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--compare", action="store_true", help="interleaved with updates in step() only, and in RAM")
    parser.add_argument("--picture", action="store_true", help="of the last step of each")
    parser.add_argument("--folder", default=None, help="of the disk")


def build(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=options.layers, n_embd=options.hidden, n_head=options.hidden // 64, vocab_size=options.vocabulary,
            n_positions=options.seq_len, tie_word_embeddings=not options.untied, **off,
        )
    )  # fmt: skip


class Row:
    """One model in training, and what its steps took."""

    def __init__(self, options: argparse.Namespace, **plugin: Any) -> None:
        model = build(options)
        self.booster = Booster(plugin=GeminiPlugin(telemetry=False, **plugin))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        self.losses: list[float] = []
        self.phases: list[dict[str, float]] = []
        self.picture: list[str] = []

    def step(self, tokens: torch.Tensor, recording: Recording) -> None:
        """One step, whose updates may go on in the background."""
        recording.clear()
        times, cpu = [time.perf_counter()], os.times()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        times.append(time.perf_counter())
        self.booster.backward(loss, self.optimizer)
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        used = os.times()
        self.losses.append(loss.item())
        disk = [*recording.spans.get("read", []), *recording.spans.get("write", [])]
        found = {"seconds": times[-1] - times[0], "cpu": used.user - cpu.user, "system": used.system - cpu.system}
        for name, begin, end in zip(PHASES, times, times[1:], strict=False):
            found[name] = end - begin
            found[f"disk in {name}"] = union(disk, begin, end)
            found[f"waits in {name}"] = union(recording.spans.get("enter", []), begin, end)
        found["read MiB"] = recording.nbytes.get("read", 0) / MIB
        found["written MiB"] = recording.nbytes.get("write", 0) / MIB
        self.phases.append(found)
        self.picture = picture(recording, times)

    def turn(self, tokens: torch.Tensor, recording: Recording) -> None:
        """Some steps in a row, all of whose updates are over at the end."""
        for _ in range(TURN):
            self.step(tokens, recording)
        boosted(self.model).manager.settle()

    def counted(self, name: str) -> list[float]:
        """Of all steps but those of the first turn, and the first of each."""
        return [phases[name] for at, phases in enumerate(self.phases) if at >= TURN and at % TURN]

    def median(self, name: str) -> float:
        return statistics.median(self.counted(name))


def picture(recording: Recording, times: Sequence[float]) -> list[str]:
    """One line for each kind of work, and one with the phases."""
    begin, end = times[0], times[-1]
    marks = ["-"] * COLUMNS
    for at in times[1:-1]:
        marks[min(COLUMNS - 1, int((at - begin) / (end - begin) * COLUMNS))] = "|"
    kinds = ("read", "write", "update", "enter")
    rows = [f"{kind:>8} |{row(recording.spans.get(kind, []), begin, end)}|" for kind in kinds]
    return [*rows, " " * 10 + "".join(marks) + "  forward | backward | step"]


def run(options: argparse.Namespace) -> dict[str, object]:
    recording = Recording()
    tokens = torch.randint(0, options.vocabulary, (options.batch_size, options.seq_len))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rate_before = mixed_rate(Path(folder), RATE_BYTES)
        on_disk = {"host_memory": options.host_memory, "offload_dir": folder}
        rows = {"on disk": Row(options, **on_disk)}
        if options.compare:
            rows["on disk, updates in step()"] = late = Row(options, **on_disk)
            boosted(late.model).engine.updates._ahead.trust.steps_without = sys.maxsize
            rows["in RAM"] = Row(options)
        with recorded(recording):
            for _ in range(1 + options.rounds):
                for each in rows.values():
                    each.turn(tokens, recording)
        rate = (rate_before + mixed_rate(Path(folder), RATE_BYTES)) / 2
    for each in rows.values():
        if options.picture:
            print(*each.picture, sep="\n")
    traffic = (rows["on disk"].median("read MiB") + rows["on disk"].median("written MiB")) * MIB / rate
    seconds = {name: each.median("seconds") for name, each in rows.items()}
    print(f"mixed rate {rate / MIB:.0f} MiB/s; traffic / rate {traffic:.2f} s; step {seconds['on disk']:.2f} s")
    if options.compare:
        assert all(each.losses == rows["in RAM"].losses for each in rows.values()), "placement has changed numbers"
        bound = max(traffic, seconds["in RAM"])
        pairs = zip(rows["on disk"].counted("seconds"), late.counted("seconds"), strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{seconds['on disk'] / bound:.2f} of the bound {bound:.2f} s; {ratio:.2f} of updates in step() only")
    table = [{"run": name, **{k: f"{each.median(k):.2f}" for k in each.phases[0]}} for name, each in rows.items()]
    losses = rows["on disk"].losses
    return {"table": table, "seconds": seconds, "traffic_seconds": traffic, "rate_bytes": rate, "losses": losses}
