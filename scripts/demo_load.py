"""Load a checkpoint of the main job with transformers alone, and see that it has learned: demo_load.py FOLDER."""

import sys

import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from gemini.train.report import Report
from gemini.train.text import Corpus


def main() -> None:
    folder = sys.argv[1]
    logging.disable_progress_bar()
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokens, targets = Corpus.load(None).batch(seed=1, step=0, batch_size=4, seq_len=model.config.n_positions)
    with torch.no_grad():
        loss = float(functional.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()))
    count = sum(parameter.numel() for parameter in model.parameters())
    report = Report(sys.stdout)
    report.heading("the checkpoint in transformers")
    report.line(f"GPT2LMHeadModel.from_pretrained({folder!r})")
    report.line(f"{count / 1e6:.1f} M parameters, loss {loss:.3f} on other pieces of the text")


if __name__ == "__main__":
    main()
