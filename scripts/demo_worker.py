"""One training of the demo under a cap on RAM; `demo_compare.py` starts it: demo_worker.py '{"kind": "plain", ...}'.

A pretrained encoder learns to fill in words of the Python reference. `plain` is PyTorch with AdamW on the last layers,
as many as it is told; `ours` trains the whole model with its homes where the plugin puts them. Both compute in fp32 on
the same batches. The cap (``RLIMIT_DATA``) counts from what the imports have taken, alike for both. Each answer is a
line of JSON: seconds of training so far and the loss on pages that are not trained on.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

LENGTH, BATCH = 64, 8
HELD_OUT = 10
"""Of as many pages one is for the loss that is shown."""
MASKED = 0.15
LOSSES = 10
"""Shown in the given time, beside the first one."""
WARM_UP_STEPS = 20

Step = Callable[[tuple[Any, Any, Any]], None]


class Pages:
    """Tokens of the Python reference, those to learn from and those held out."""

    def __init__(self, folder: Path) -> None:
        from pydoc_data.topics import topics

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._mask = tokenizer.token_to_id("[MASK]")
        parts: dict[bool, list[int]] = {True: [], False: []}
        for number, name in enumerate(sorted(topics)):
            parts[number % HELD_OUT == 0] += tokenizer.encode(topics[name], add_special_tokens=False).ids
        self._tokens = {is_held_out: torch.tensor(ids) for is_held_out, ids in parts.items()}

    def batch(self, number: int, is_held_out: bool) -> tuple[Any, Any, Any]:
        """Tokens with some masked, which they are, and what was there."""
        generator, source = torch.Generator().manual_seed(number), self._tokens[is_held_out]
        starts = torch.randint(len(source) - LENGTH, (BATCH, 1), generator=generator)
        tokens = source[starts + torch.arange(LENGTH)]
        masked = torch.rand(tokens.shape, generator=generator) < MASKED
        return tokens.masked_fill(masked, self._mask), masked, tokens[masked]


class Masked(torch.nn.Module):
    """The encoder with a head for words, tied to its embedding; gives the loss."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        config = transformers.BertConfig.from_pretrained(folder)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.model = transformers.BertForMaskedLM.from_pretrained(folder, config=config)

    def forward(self, tokens: Any, masked: Any, words: Any) -> Any:
        hidden = self.model.bert(tokens).last_hidden_state[masked]
        return torch.nn.functional.cross_entropy(self.model.cls(hidden), words)


def begin_as_identity(model: Any) -> None:
    """The weights have no head: its square layer begins as the identity."""
    weight = model.model.cls.predictions.transform.dense.weight
    with torch.no_grad():
        weight.copy_(torch.eye(weight.size(0)))


def plain(folder: Path, layers: int, rate: float) -> tuple[Any, Any, Step]:
    """The head and the last layers train, the rest is frozen; -1 for all, with the embedding."""
    model = Masked(folder)
    begin_as_identity(model)
    if layers >= 0:
        model.model.bert.requires_grad_(False)
        blocks = model.model.bert.encoder.layer
        for block in blocks[len(blocks) - layers :]:
            block.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, fused=True)

    def step(batch: tuple[Any, Any, Any]) -> None:
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def ours(folder: Path, offload: str, rate: float, host_memory: int | None) -> tuple[Any, Any, Step]:
    """All of it, with nothing but a folder for what does not fit."""
    from gemini.booster import Booster
    from gemini.booster.plugin import GeminiPlugin
    from gemini.lazy import LazyInitContext
    from gemini.nn.optimizer import HybridAdam

    with LazyInitContext():
        model: Any = Masked(folder)
    booster = Booster(plugin=GeminiPlugin(precision="fp32", offload_dir=offload, host_memory=host_memory))
    optimizer: Any = HybridAdam(model.parameters(), lr=rate, weight_decay=0.01)
    model, optimizer, *_ = booster.boost(model, optimizer)
    begin_as_identity(model)

    def step(batch: tuple[Any, Any, Any]) -> None:
        booster.backward(model(*batch), optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, step


def data_bytes() -> int:
    """What counts for RLIMIT_DATA."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmData:")[1].split()[0]) << 10


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asked = json.loads(sys.argv[1])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    folder = Path(asked["folder"])
    pages = Pages(folder)
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts the threads, whose stacks count, too
    if asked["cap"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + asked["cap"],) * 2)
    if asked["kind"] == "plain":
        model, optimizer, step = plain(folder, asked["layers"], asked["rate"])
    else:
        model, optimizer, step = ours(folder, asked["offload"], asked["rate"], asked.get("host"))
    total, trained = (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    print(json.dumps({"parameters": total, "trained": trained}), file=out, flush=True)
    train(pages, model, optimizer, step, asked, lambda values: print(json.dumps(values), file=out, flush=True))


def train(
    pages: Pages,
    model: Any,
    optimizer: Any,
    step: Step,
    asked: dict[str, Any],
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Until the seconds, or the steps, are over. Looking at the loss does not count."""
    spent, shown, number = 0.0, 0.0, 0
    while True:
        if number in asked.get("at", ()) or (asked["seconds"] and spent >= shown):
            tell({"seconds": spent, "steps": number, "loss": held_out_loss(pages, model)})
            shown += asked["seconds"] / LOSSES
        if number >= asked["steps"] or (asked["seconds"] and spent >= asked["seconds"]):
            break
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = asked["rate"] * min(1.0, (number + 1) / WARM_UP_STEPS)
        step(pages.batch(number, is_held_out=False))
        number += 1
        spent += time.perf_counter() - begin
    tell({"ended": True, "steps": number, "seconds": spent, "data_bytes": data_bytes()})


def held_out_loss(pages: Pages, model: Any) -> float:
    with torch.no_grad():
        return sum(float(model(*pages.batch(10**6 + number, is_held_out=True))) for number in range(4)) / 4


if __name__ == "__main__":
    main()
