"""Who gets how much of one memory: from claims to grants. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one holder asks of one memory, in bytes."""

    floor: int
    """What it needs at least; what its user has said. It is not taken away from it."""
    wish: int
    """What it can make use of; never less than the floor."""

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.wish:
            raise ValueError(f"a claim needs 0 <= floor <= wish, got {self.floor} and {self.wish}")


def share(total_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """The grant of each claim, in their order.

    Floors come first, those of earlier claims before those of later ones; a last one may get less than its floor. The
    rest is shared in proportion to what wishes go beyond floors, so all get their wish where there is enough.
    The grants depend on the claims alone, not on what was granted before: the same claims give the same grants.
    """
    grants, left = [], max(0, total_bytes)
    for claim in claims:
        grants.append(min(claim.floor, left))
        left -= grants[-1]
    more = [claim.wish - claim.floor for claim in claims]
    wanted = sum(more)
    if wanted <= left:
        return [grant + each for grant, each in zip(grants, more, strict=True)]
    return [grant + left * each // wanted for grant, each in zip(grants, more, strict=True)]
