"""One memory of the machine as its holders share it: what there is, what is promised, what each gets. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gemini.lease.limits import Limit
from gemini.lease.sharing import Claim, share
from gemini.lease.standing import Holding, Standing


@dataclass(frozen=True, slots=True)
class Pool:
    """A limit, and the leases under it."""

    limit: Limit
    memory: str
    members: Mapping[str, Standing]
    """By name of the lease, the earliest first."""
    grown: int | None = None
    """What is taken of a limit of one process since its lease began; None: what the leases say."""

    @classmethod
    def of(cls, limit: Limit, memory: str, standings: Mapping[str, Standing], grown: int | None = None) -> "Pool":
        """The leases among ``standings`` that live under a limit."""
        found = {n: s for n, s in standings.items() if memory in s.holdings and limit.pool in s.holdings[memory].pools}
        order = sorted(found, key=lambda name: (found[name].started, name))
        return cls(limit, memory, {name: found[name] for name in order}, grown)

    @property
    def total(self) -> int:
        """Bytes that all holders may have together: what is free, and what they have taken of what is promised to them.

        What a process has taken beyond that (its user's own data) is neither.
        """
        taken: dict[int, list[Holding]] = {}
        for standing in self.members.values():
            taken.setdefault(standing.pid, []).append(standing.holdings[self.memory])
        return self.limit.free + sum(
            min(
                max(holding.grown for holding in of_process) if self.grown is None else self.grown,
                sum(holding.held for holding in of_process),
            )
            for of_process in taken.values()
        )

    @property
    def promised(self) -> int:
        """Bytes that the holders may take together."""
        return sum(standing.holdings[self.memory].held for standing in self.members.values())

    def left_for(self, name: str) -> int:
        """What is promised to nobody else."""
        others = [s.holdings[self.memory].held for other, s in self.members.items() if other != name]
        return max(0, self.total - sum(others))

    def grants(self) -> dict[str, int]:
        """What each holder gets. The ranks of one training ask together, and each gets the same."""
        jobs: dict[str, list[str]] = {}
        for name, standing in self.members.items():
            is_one_of_many = standing.ranks > 1 and self.limit.shared
            jobs.setdefault(f"ranks of {standing.job}" if is_one_of_many else name, []).append(name)
        granted = share(self.total, [self._claim(names) for names in jobs.values()])
        found = {}
        for names, nbytes in zip(jobs.values(), granted, strict=True):
            found.update(dict.fromkeys(names, nbytes // self._ranks(names)))
        return found

    def _ranks(self, names: Iterable[str]) -> int:
        return max(self.members[name].ranks for name in names) if self.limit.shared else 1

    def _claim(self, names: Iterable[str]) -> Claim:
        holdings = [self.members[name].holdings[self.memory] for name in names]
        floor, wish = max(h.floor for h in holdings), max(h.wish for h in holdings)
        ranks = self._ranks(names)
        return Claim(floor=ranks * min(floor, wish), wish=ranks * wish)


@dataclass(frozen=True, slots=True)
class Look:
    """What one holder finds of one memory."""

    grant: int
    """Its part by what all of them ask."""
    left: int
    """What it could have now, beside what is promised to the others."""
    others: int
    """How many other holders there are."""


def look(name: str, pools: Iterable[Pool]) -> Look:
    """What a holder finds, where all of these pools bound its memory."""
    found = list(pools)
    return Look(
        min(pool.grants()[name] for pool in found),
        min(pool.left_for(name) for pool in found),
        max(len(pool.members) - 1 for pool in found),
    )
