"""What a case has to show: plain PyTorch fails under the cap, ours has its losses there, and takes no more than before.

A peak that is above its baseline is measured again, and the least of some runs counts: what a leak takes is there in
each of them, what a busy machine takes is not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outcome import Check, Failure, Report

from gemini.sizes import format_bytes

from .cases import Case
from .keeper import Keeper
from .nursery import Told
from .training import STEPS

TOLERANCE_RATIO = 0.03
BESIDE_BYTES = 1 << 20
"""What may be there above the baseline beside what our ledger counts: at rest, and when a model is gone."""
ATTEMPTS = 3
_LEAST_ROOM_RATIO = 0.04
"""Between our peak and plain PyTorch's: with less a cap in between would prove nothing."""

MEASURES: dict[str, Callable[[Told], int]] = {
    "peak": lambda told: told.peak_resident,
    "beside": lambda told: told.rest_anonymous - told.facts["ledger_bytes"],
    "left": lambda told: told.left_anonymous,
}
_WORDS = {
    "peak": "peak of the resident set",
    "beside": "at rest, beside what the ledger counts",
    "left": "left when the model is gone",
}

_UNCOUNTED = "full copies have, beside what is counted for them"


@dataclass(slots=True)
class Seen:
    """The least that some runs took, by measure; of several ranks the one that took the most."""

    least: dict[str, int] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def add(self, ranks: list[Told]) -> None:
        for name, of in MEASURES.items():
            nbytes = max(of(told) for told in ranks)
            self.least[name] = min(self.least.get(name, nbytes), nbytes)
            self.most[name] = max(self.most.get(name, nbytes), nbytes)


def limits(case: Case, known: Mapping[str, Any]) -> dict[str, int]:
    """What is allowed of each measure, by the baseline of a case.

    With two ranks, when a chunk comes and goes depends on the other rank's time. There a peak may be one full copy
    more, and what the ledger counts of memory that nothing was written to yet says nothing about the resident set.
    """
    peak = known["peak_bytes"]
    allowed = {"peak": peak + int(TOLERANCE_RATIO * peak), "left": known["left_bytes"] + BESIDE_BYTES}
    if case.ranks > 1:
        allowed["peak"] += known["chunk_bytes"]
    else:
        allowed["beside"] = known["beside_bytes"] + BESIDE_BYTES
    return allowed


def prove(
    keeper: Keeper,
    case: Case,
    known: Mapping[str, Any] | None,
    sabotage: str | None = None,
    attempts: int = ATTEMPTS,
) -> Report:
    """Run a case against its baseline; without one against nothing, which is a failure."""
    free = _told(keeper.train(case, "plain", None), "plain PyTorch without a cap")[0]
    if known is None:
        known = measure(keeper, case, 1)
        checks = [Check("its peaks", "a baseline", "none: run with --update-baseline", False)]
    else:
        checks = []
    cap, allowed = known["cap_bytes"], limits(case, known)
    plain = keeper.train(case, "plain", cap)[0]
    died = not isinstance(plain, str) and plain.out_of_memory
    checks.append(Check(f"plain PyTorch with {format_bytes(cap)}", "out of memory", _became(plain), died))
    seen, facts = Seen(), dict[str, Any]()
    for _ in range(attempts):
        ranks = keeper.train(case, "ours", cap, sabotage)
        alike = [_is_alike(case, free, told, rank) for rank, told in enumerate(ranks)]
        if not all(alike):
            break
        told = [each for each in ranks if not isinstance(each, str)]
        seen.add(told)
        facts = told[0].facts
        uncounted = max(each.facts["uncounted_bytes"] for each in told)
        if all(seen.least[name] <= most for name, most in allowed.items()):
            break
    for rank, each in enumerate(ranks):
        who = f"ours with {format_bytes(cap)}" + (f", rank {rank}" if case.ranks > 1 else "")
        checks.append(Check(who, f"{STEPS} steps, plain's losses", _became(each), alike[rank]))
    for name, most in allowed.items() if seen.least else ():
        nbytes = seen.least[name]
        checks.append(Check(_WORDS[name], f"at most {format_bytes(most)}", format_bytes(nbytes), nbytes <= most))
    if facts:
        in_use = facts["pinned"]
        checks.append(Check(_UNCOUNTED, "0 B", format_bytes(uncounted), uncounted == 0))
        checks.append(Check("chunks in use after the last step", "0", str(in_use), in_use == 0))
    return Report(name=case.name, checks=tuple(checks), facts={**facts, **seen.least, "cap_bytes": cap})


def measure(keeper: Keeper, case: Case, runs: int) -> dict[str, Any]:
    """A baseline: peaks of some runs without a cap, and a cap halfway between ours and plain PyTorch's.

    Raises
    ------
    Failure
        If there is no room between them, or a run fails.
    """
    plain = _told(keeper.train(case, "plain", None), "plain PyTorch without a cap")[0]
    seen, space = Seen(), 0
    for _ in range(runs):
        ranks = _told(keeper.train(case, "ours", None), "ours without a cap")
        seen.add(ranks)
        space = max(space, *(told.peak_space for told in ranks))
        facts = ranks[0].facts
    if plain.peak_space < (1 + _LEAST_ROOM_RATIO) * space:
        raise Failure(
            f"ours takes {format_bytes(space)}, plain PyTorch {format_bytes(plain.peak_space)}: no cap between"
        )
    return {
        "cap_bytes": (space + plain.peak_space) // 2,
        "plain_bytes": plain.peak_space,
        "chunk_bytes": facts["chunk_bytes"],
        "evictions": facts["evictions"],
        **{_key(name): nbytes for name, nbytes in seen.least.items()},
        "spread": {_key(name): seen.most[name] - seen.least[name] for name in MEASURES},
        "runs": runs,
    }


def taken(case: Case, baseline: Mapping[str, Any]) -> Report:
    """What is said of a baseline that was just measured."""
    checks = [Check(_WORDS[name], "new baseline", format_bytes(baseline[_key(name)]), True) for name in MEASURES]
    return Report(name=case.name, checks=tuple(checks), facts=dict(baseline))


def _key(name: str) -> str:
    return f"{name}_bytes"


def _told(ended: list[Told | str], what: str) -> list[Told]:
    told = [each for each in ended if not isinstance(each, str)]
    if len(told) < len(ended) or any(each.error for each in told):
        raise Failure(f"{what}: {'; '.join(_became(each) for each in ended)}")
    return told


def _is_alike(case: Case, free: Told, told: Told | str, rank: int) -> bool:
    return not isinstance(told, str) and not told.error and told.losses == free.losses[rank :: case.ranks]


def _became(told: Told | str) -> str:
    if isinstance(told, str):
        return told[:200]
    if told.out_of_memory:
        return f"out of memory after {len(told.losses)} losses: {told.error[:160]}"
    if told.error:
        return told.error[-300:]
    return f"{len(told.losses)} losses, {told.losses[0]:.6f} -> {told.losses[-1]:.6f}"
