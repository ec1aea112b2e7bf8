"""Random programs for ranks, and what must come of them: the weights of one process, or an error."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from rank_programs import Training
from torch import Tensor

FORWARDS = ("forward", "forward rows=5", "forward skipped=1")
LOOKS = ("read", "show", "state", "optimizer_state", "evaluate")
HARMLESS = ("fail_in_forward", "fail_before_step")
FAILURES = ("fail_in_backward", "fail_within_backward", "fail_in_gradient_hook")
TOGETHER = ("clip", "step", "edit")
"""What all ranks do, or none."""
ALL = (*FORWARDS, "backward", "zero", *LOOKS, *HARMLESS, *FAILURES, *TOGETHER)


def programs_of(seed: int, ranks: int = 2) -> list[list[str]]:
    """A program for each rank: training that all do alike, but for a few changes."""
    chance = random.Random(seed)
    common: list[str] = []
    for _ in range(chance.randint(1, 3)):
        for _ in range(chance.randint(1, 2)):
            common += [chance.choice(FORWARDS), "backward"]
        common += [chance.choice((*LOOKS, "save"))] * (chance.random() < 0.3)
        common += ["clip"] * (chance.random() < 0.3)
        common += ["step", "zero"]
        common += ["edit"] * (chance.random() < 0.15)
    programs = [list(common) for _ in range(ranks)]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        program = chance.choice(programs)
        at = chance.randrange(len(program))
        program[at : at + chance.randint(0, 1)] = [chance.choice(ALL)] * chance.randint(0, 1)
    return programs


@dataclass
class _Rank:
    operations: list[str]
    backwards: int = 0
    pending: str | None = None
    """The forward whose loss waits for its backward."""
    rounds: list[tuple[int, str] | None] = field(default_factory=list)
    """Number of the batch and forward of each backward since gradients were dropped; None for one of others alone."""
    drops: int = 0
    has_failed: bool = False
    saves: int = 0
    """Of the same state."""

    def advance(self, ranks: int, index: int) -> str | None:
        """Come to the next thing that all ranks do together; None at the end."""
        while self.operations:
            operation = self.operations.pop(0)
            if operation in TOGETHER:
                return operation
            if operation.startswith("forward"):
                self.pending = operation
            elif operation == "backward":
                self.rounds.append((self.backwards * ranks + index, self.pending or "forward"))
                self.backwards, self.pending = self.backwards + 1, None
            elif operation == "zero" and self.rounds:
                self.rounds, self.drops = [], self.drops + 1
            elif operation in FAILURES:
                self.has_failed = True
            elif operation == "save":
                self.saves += 1
        return None


def expected(programs: Sequence[Sequence[str]]) -> dict[str, Tensor] | None:
    """The weights that one process comes to which does the same; None where the ranks must be told an error."""
    ranks = [_Rank(list(program)) for program in programs]
    alone = Training()
    drops = summed = 0
    while True:
        came_to = {rank.advance(len(ranks), index) for index, rank in enumerate(ranks)}
        if len(came_to) > 1 or any(rank.saves > ranks[0].saves for rank in ranks):  # the first one saves for all
            return None
        (together,) = came_to
        if together is None:
            return alone.weights()
        if together in ("clip", "step"):
            if any(rank.has_failed for rank in ranks) or len({rank.drops for rank in ranks}) > 1:
                return None
            if ranks[0].drops > drops:
                alone.zero()
                drops, summed = ranks[0].drops, 0
            rounds = max(len(rank.rounds) for rank in ranks)
            for rank in ranks:
                rank.rounds += [None] * (rounds - len(rank.rounds))
            for number in range(summed, rounds):
                for rank in ranks:
                    if (done := rank.rounds[number]) is not None:
                        alone.accumulate(*done)
            summed = rounds
        getattr(alone, together)()
        if together in ("step", "edit"):
            for rank in ranks:
                rank.pending, rank.saves = None, 0
