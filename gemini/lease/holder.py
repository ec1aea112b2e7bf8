"""The part of the machine's memory that one process holds, and what it sees of the parts of others."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from gemini.lease.asked import Asked, from_text
from gemini.lease.folder import Lease, LeaseFolder
from gemini.lease.limits import ROOT, Limit, private_ram
from gemini.lease.pools import Look, Pool, look
from gemini.lease.sharing import Claim
from gemini.lease.standing import HOST, Answer, Holding, Seen, Standing

logger = logging.getLogger(__name__)

LimitsOf = Callable[[], list[Limit]]
_WAIT_POLL_SECONDS = 0.02
_ALONE = "alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holds:
    """What a holder has of one memory, in bytes."""

    claim: Claim
    held: int
    used: int = 0


class Holder:
    """Keeps a lease, and finds what it may hold beside those of others.

    Without a folder for leases (a home that cannot be written) it sees nobody else.

    Parameters
    ----------
    limits
        By memory, what bounds it now.
    standing
        Who this is; holdings are added.
    folder
        Where the leases are.
    root
        Below which files of the kernel are.
    """

    def __init__(
        self,
        limits: Mapping[str, LimitsOf],
        standing: Standing,
        folder: LeaseFolder,
        root: Path = ROOT,
    ) -> None:
        self._folder = folder
        self._root = root
        self._standing = replace(standing, base_bytes=private_ram(root=root))
        self._base: dict[str, int] = {}
        """By pool, what was taken when the lease began."""
        self._limits: dict[str, LimitsOf] = {}
        self.watch(limits)
        self._lease: Lease | None = None
        self._is_unheard = False
        """True once a failure to tell the others has been logged."""
        try:
            self._lease = folder.begin(self._standing)
        except OSError as error:
            logger.warning("other runs cannot see what this one holds of the machine's memory: %s", error)

    def watch(self, limits: Mapping[str, LimitsOf]) -> None:
        """These limits bound what is held, beside those that are known."""
        for memory in limits.keys() - self._limits.keys():
            self._limits[memory] = limits[memory]
            self._base |= {limit.pool: limit.total - limit.free for limit in limits[memory]()}

    @property
    def memories(self) -> frozenset[str]:
        """Those that have limits on this machine."""
        return frozenset(self._limits)

    @property
    def name(self) -> str:
        """Of the lease."""
        return _ALONE if self._lease is None else self._lease.name

    def say(self, holds: Mapping[str, Holds], is_waiting: bool = False, answer: Answer | None = None) -> None:
        """Tell the others what is asked and held."""
        grown = (
            max(0, private_ram(root=self._root) - self._standing.base_bytes) >> 20 << 20
        )  # rounded: seldom rewritten
        limits = {memory: self._limits[memory]() for memory in holds}
        holdings = {
            memory: Holding(
                pools=tuple(limit.pool for limit in limits[memory]),
                seen={} if memory == HOST else {limit.pool: _seen(limit) for limit in limits[memory]},
                floor=each.claim.floor,
                wish=each.claim.wish,
                held=each.held,
                used=each.used,
                grown=grown if memory == HOST else each.used,
            )
            for memory, each in holds.items()
        }
        answer = answer or self._standing.answer
        self._standing = replace(self._standing, holdings=holdings, is_waiting=is_waiting, answer=answer)
        if self._lease is not None:
            try:
                self._lease.say(self._standing)
            except OSError as error:  # a full disk, say: it must not end a training
                if not self._is_unheard:
                    logger.warning("other runs do not hear what this one holds of the machine's memory: %s", error)
                self._is_unheard = True

    def look(self) -> dict[str, Look]:
        """What there is of each memory that was told of."""
        standings = {**self._others(), self.name: self._standing}
        return {
            memory: look(self.name, [self._pool(limit, memory, standings) for limit in self._limits[memory]()])
            for memory in self._standing.holdings
        }

    def _pool(self, limit: Limit, memory: str, standings: Mapping[str, Standing]) -> Pool:
        grown = None if limit.shared else max(0, limit.total - limit.free - self._base.get(limit.pool, 0))
        return Pool.of(limit, memory, standings, grown)

    def wait(self, memory: str, enough: Callable[[Look], bool], seconds: float) -> Look:
        """Look until there is enough of a memory, or this many seconds have passed."""
        end = time.monotonic() + seconds
        while True:
            found = self.look()[memory]
            if enough(found) or time.monotonic() >= end:
                return found
            time.sleep(_WAIT_POLL_SECONDS)

    def take_asked(self) -> Asked | None:
        """What a user asks of this run, once."""
        text = None if self._lease is None else self._lease.take_asked()
        return None if text is None else from_text(text)

    def end(self) -> None:
        """Give everything back. Idempotent."""
        if self._lease is not None:
            self._lease.end()

    def _others(self) -> dict[str, Standing]:
        here, found = os.getpid(), self._folder.standings()
        found.pop(self.name, None)
        return {name: self._seen(standing, here) for name, standing in found.items()}

    def _seen(self, standing: Standing, here: int) -> Standing:
        """A lease with what its process has taken now, where that is to be seen."""
        if standing.pid != here and standing.namespace != self._standing.namespace:
            return standing
        return with_growth(standing, private_ram(standing.pid if standing.pid != here else "self", self._root))


def _seen(limit: Limit) -> Seen:
    return Seen(limit.name, limit.free >> 26 << 26, limit.total)  # rounded: the file is rewritten when it changes


def with_growth(standing: Standing, private_bytes: int) -> Standing:
    """A lease of a process that has taken this much RAM in all."""
    holding = standing.holdings.get(HOST)
    if holding is None or not private_bytes:
        return standing
    grown = max(0, private_bytes - standing.base_bytes)
    return replace(standing, holdings={**standing.holdings, HOST: replace(holding, grown=grown)})


def own_standing(job: str, program: str, rank: int, ranks: int) -> Standing:
    """This process, as it begins a lease."""
    return Standing(
        job=job,
        program=program,
        pid=os.getpid(),
        namespace=namespace_of_this_process(),
        started=time.time(),
        rank=rank,
        ranks=ranks,
    )


def namespace_of_this_process() -> int:
    """In which process ids count here; 0 where that is not to be known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
