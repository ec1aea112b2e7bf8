"""One rank of `saving.py`: ``saving_worker.py FOLDER SIZES ROUNDS``. The first one prints JSON, a line a round."""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gemini
from gemini.booster import Booster
from gemini.booster.plugin import GeminiPlugin
from gemini.nn.optimizer import HybridAdam


def build(sizes: dict[str, int]) -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, vocab_size=8192, n_positions=128))


def trained(model: Any, optimizer: Any, backward: Callable[[Any], None]) -> None:
    tokens = torch.zeros((1, 16), dtype=torch.int64)
    backward(model(input_ids=tokens, labels=tokens).loss)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    folder, sizes, rounds = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    warnings.simplefilter("ignore")
    gemini.launch_from_torch({})
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = build(sizes)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", telemetry=False))
    ours, optimizer, *_ = booster.boost(model, HybridAdam(model.parameters()))
    trained(ours, optimizer, lambda loss: booster.backward(loss, optimizer))
    theirs, mesh = build(sizes), init_device_mesh("cpu", (ranks,))
    for block in theirs.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    their_optimizer = torch.optim.AdamW(theirs.parameters())
    trained(theirs, their_optimizer, lambda loss: loss.backward())
    nbytes = 12 * sum(p.numel() for p in build(sizes).parameters())
    plain = os.urandom(1 << 20)

    def save(layout: str) -> None:
        booster.save(folder / layout, model=ours, optimizer=optimizer, keep=1, layout=layout)

    def save_theirs() -> None:
        state, states = get_state_dict(theirs, their_optimizer)
        torch_dcp.save({"model": state, "optim": states}, checkpoint_id=folder / "theirs")

    def write() -> None:
        with open(folder / f"plain-{rank}", "wb") as file:
            for _ in range(nbytes // ranks >> 20):
                file.write(plain)
            file.flush()
            os.fsync(file.fileno())

    kinds: dict[str, Callable[[], None]] = {
        "plain write": write,
        "ours, dcp": lambda: save("dcp"),
        "FSDP2 + dcp.save": save_theirs,
        "ours, Hugging Face": lambda: save("hf"),
    }
    for number in range(rounds + 1):
        found: dict[str, float] = {"bytes": nbytes}
        for kind, do in kinds.items():
            dist.barrier()
            begin = time.perf_counter()
            do()
            dist.barrier()
            found[kind] = time.perf_counter() - begin
            if rank == 0:
                for left in folder.iterdir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            dist.barrier()
        if rank == 0 and number:  # the first one is not counted
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
