"""A step that is bound by the disk, phase by phase: when the disk works, when the units compute, who waits.

Each row of the picture is one kind of work over the time of one step, a column a fiftieth of it: blank, ``.`` (some),
``o`` (half) or ``#`` (all of that time). Below it: seconds of each phase, in which of them the disk works, the bytes,
and the two bounds of the step: computing alone, and moving the bytes at the disk's mixed rate.
"""

import argparse
import os
import statistics
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

from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.chunk.disk_file import DiskFile, Requests
from gemini.updates.update_pipeline import Block

COLUMNS = 50
MIB = 1 << 20
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
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--update-in-backward", action="store_true")
    parser.add_argument("--picture", action="store_true", help="of the last step")
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


def run(options: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rate_before = mixed_rate(Path(folder), 256 * MIB)
        model = build(options)
        memory = {} if options.host_memory == "all" else {"host_memory": options.host_memory}
        plugin = GeminiPlugin(
            telemetry=False, offload_dir=folder, update_in_backward=options.update_in_backward, **memory
        )
        booster = Booster(plugin=plugin)
        model, optimizer, *_ = booster.boost(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
        tokens = torch.randint(0, options.vocabulary, (options.batch_size, options.seq_len))
        recording, seconds, losses = Recording(), [], []
        phases: list[dict[str, float]] = []
        with recorded(recording):
            for _ in range(options.steps):
                recording.clear()
                times = [time.perf_counter()]
                cpu = os.times()
                loss = model(input_ids=tokens, labels=tokens).loss
                times.append(time.perf_counter())
                booster.backward(loss, optimizer)
                times.append(time.perf_counter())
                optimizer.step()
                optimizer.zero_grad()
                times.append(time.perf_counter())
                used = os.times()
                losses.append(loss.item())
                seconds.append(times[-1] - times[0])
                disk = [*recording.spans.get("read", []), *recording.spans.get("write", [])]
                found = {"seconds": seconds[-1], "cpu": used.user - cpu.user, "system": used.system - cpu.system}
                for name, begin, end in zip(("forward", "backward", "step"), times, times[1:], strict=False):
                    found[name] = end - begin
                    found[f"disk in {name}"] = union(disk, begin, end)
                    found[f"waits in {name}"] = union(recording.spans.get("enter", []), begin, end)
                found["update"] = union(recording.spans.get("update", []), times[0], times[-1])
                found["read MiB"] = recording.nbytes.get("read", 0) / MIB
                found["written MiB"] = recording.nbytes.get("write", 0) / MIB
                phases.append(found)
                print("  ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
        if options.picture:
            for kind in ("read", "write", "update", "enter"):
                print(f"{kind:>8} |{row(recording.spans.get(kind, []), times[0], times[-1])}|")
            marks = ["-"] * COLUMNS
            for at in times[1:-1]:
                marks[min(COLUMNS - 1, int((at - times[0]) / (times[-1] - times[0]) * COLUMNS))] = "|"
            print(" " * 10 + "".join(marks) + "  forward | backward | step")
        rate = (rate_before + mixed_rate(Path(folder), 256 * MIB)) / 2
    timed = phases[3:] or phases
    median = {key: statistics.median(each[key] for each in timed) for key in timed[0]}
    moved = (median["read MiB"] + median["written MiB"]) * MIB
    print(f"mixed rate {rate / MIB:.0f} MiB/s; traffic / rate {moved / rate:.2f} s; step {median['seconds']:.2f} s")
    return {"median": median, "rate_bytes": rate, "losses": losses, "seconds": seconds}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    add_arguments(arguments)
    print(run(arguments.parse_args())["losses"])
