"""The cases of the matrix: what is combined, what cannot be, and a small selection in which each pair occurs."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations, product
from typing import Any

FACTORS: dict[str, tuple[Any, ...]] = {
    "model": ("gpt", "llama", "t5", "moe", "vit", "lora"),
    "policy": ("auto", "static"),
    "tier": ("device", "ram", "disk"),
    "precision": ("fp32", "bf16", "split"),
    "init": ("lazy", "eager"),
    "ranks": (1, 2),
    "activations": ("keep", "offload", "recompute"),
}
_SEED = 7


@dataclass(frozen=True, slots=True)
class Case:
    """One combination."""

    model: str
    policy: str
    tier: str
    """Where homes are: ``ram``; ``device``: masters in RAM, states on disk, and full copies stream through a small
    device; ``disk``: some in RAM, most on disk; ``ring``: all on disk, and nearly all RAM is for full copies."""
    precision: str
    """``split``: bf16 with ``split_master``."""
    init: str
    ranks: int
    activations: str

    @property
    def name(self) -> str:
        """Its name in the list and among the baselines."""
        return "-".join(str(value) for value in asdict(self).values())


RING = Case("gpt", "static", "ring", "fp32", "lazy", 1, "keep")
"""Not of the product: here full copies are most of what there is, so that a ring that is 5 % larger is seen."""


def why_not(case: Case) -> str:
    """Why a case proves nothing and is left out; empty if it is among the cases."""
    if case.model == "lora" and case.activations == "keep" and (case.tier != "disk" or case.ranks > 1):
        return "frozen weights in RAM (or threads of ranks) and kept activations take what plain PyTorch takes"
    return ""


def all_cases() -> list[Case]:
    """The whole product, and the ring."""
    return [*_product(), RING]


def covering() -> list[Case]:
    """A small selection in which each pair of values occurs that can occur. The same in every run.

    Greedy: of some cases drawn among those that have an open pair, the one with the most open pairs comes next.
    """
    rng = random.Random(_SEED)
    every = _product()
    rng.shuffle(every)
    pairs = {case: set(_pairs(case)) for case in every}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        useful = [case for case in every if pairs[case] & left]
        best = max(useful, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs[best]
    return [*sorted(chosen, key=lambda case: case.name), RING]


def named(name: str) -> Case:
    """The case with this name.

    Raises
    ------
    ValueError
        If there is none.
    """
    for case in all_cases():
        if case.name == name:
            return case
    raise ValueError(f"there is no case {name!r}")


def _product() -> list[Case]:
    cases = (Case(*values) for values in product(*FACTORS.values()))
    return [case for case in cases if not why_not(case)]


def _pairs(case: Case) -> Iterator[tuple[Any, ...]]:
    return combinations(asdict(case).items(), 2)
