"""Seeding costs what it does to the generators that are there.

For each kind of accelerator that is not, `torch.manual_seed` notes for later where it was called, with the whole stack:
a millisecond a call under pytest, and the notes are never dropped.
"""

import torch


def seed_only_what_is_there() -> None:
    """Have kinds of accelerators that this machine has not be left out."""
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = _nothing


def _nothing(seed: int) -> None:
    pass
