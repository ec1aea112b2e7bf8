"""Where the random numbers of a recorded op come from.

Nothing is drawn while recording, so the tape must know, for each random op, which generator state it will see at
replay: that of the previous random op, unless the generator was moved in between (``manual_seed``,
``set_rng_state``, a draw outside of the tape). Comparing states is not enough to see that: ``manual_seed(0)`` right
before the context and again inside it leaves two equal states that mean different things.

So after each recorded draw the generator is *tagged* with a number that only we write. The CPU generator is an MT19937
whose state word 0 has 31 dead bits (the recurrence uses the top bit only, and the word itself has been handed out
already, or is regenerated before it is handed out). The tag lives there: **it changes no number that is ever drawn**,
it only makes the state recognisable. A saved state that comes back (``fork_rng``) is recognised by its tag too and
means "the state after that draw".
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from weakref import WeakSet

import torch
from torch import Tensor

STATE_NBYTES = 5056  # of at::CPUGeneratorImplState; another size means another layout, which is then left untagged
HEADER = struct.Struct("<QiiQ")  # seed, left, seeded, next; then 624 words of 8 bytes
_DEAD_BITS = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class SeedPoint:
    """Someone else moved the generator: replay sets it to `state`, or to where it was after record `after`."""

    generator: torch.Generator
    state: Tensor | None
    after: int | None


@dataclass(slots=True)
class _Track:
    base: Tensor
    """The last state that was not ours."""
    expected: Tensor
    """The state of the generator unless it was moved since the last recorded draw."""
    marks: dict[bytes, int] = field(default_factory=dict)
    """Digest of a tagged state -> index of the record after which it was set."""

    def rebase(self, state: Tensor) -> None:
        """Write the next tag on this state."""
        self.base = state

    def put_back(self, state: Tensor) -> None:
        """The generator has been put back to this state, which was ours."""
        self.expected = state

    def tag(self, tag: int, index: int) -> Tensor:
        """The state that says "after record `index`"."""
        self.expected = _tagged(self.base, tag)
        self.marks[_digest(self.expected)] = index
        return self.expected


class GeneratorLog:
    """Watches the generators that recorded ops draw from."""

    def __init__(self) -> None:
        self._tracks: dict[torch.Generator, _Track] = {}
        # A random start keeps the tags of two tapes apart.
        self._next_tag = int.from_bytes(os.urandom(4), "little") & _DEAD_BITS
        with _logs_lock:
            _logs.add(self)

    def observe(self, generator: torch.Generator) -> SeedPoint | None:
        """Return the seed point to record before a draw, or None if the generator is where the last draw left it."""
        state = generator.get_state()
        track = self._tracks.get(generator)
        if track is None:
            self._tracks[generator] = _Track(state, state)
            return SeedPoint(generator, state, None)
        if torch.equal(state, track.expected):
            return None
        recalled = self.recall(generator)
        if recalled is not None:
            return recalled
        if torch.equal(_tagged(state, 0), _tagged(track.base, 0)) and _is_tag_of_another(self, generator, state):
            return None  # another thread records from the same state, and nothing was drawn
        track.rebase(state)
        return SeedPoint(generator, state, None)

    def recall(self, generator: torch.Generator) -> SeedPoint | None:
        """Return the seed point for a state of ours that somebody has put back, or None if there is none to record."""
        track, state = self._tracks[generator], generator.get_state()
        after = track.marks.get(_digest(state))
        if after is None or torch.equal(state, track.expected):
            return None
        track.put_back(state)
        return SeedPoint(generator, None, after)

    def tag(self, generator: torch.Generator, index: int) -> None:
        """Mark the generator as being "after record `index`"."""
        self._next_tag = (self._next_tag + 1) & _DEAD_BITS
        generator.set_state(self._tracks[generator].tag(self._next_tag, index))

    def rebase(self, generator: torch.Generator, state: Tensor) -> None:
        """Write the next tag on `state`."""
        self._tracks[generator].rebase(state)

    def untouched(self, generator: torch.Generator) -> bool:
        """True if the generator was not moved since the last recorded draw."""
        track = self._tracks.get(generator)
        return track is not None and torch.equal(generator.get_state(), track.expected)

    def generators(self) -> list[torch.Generator]:
        """Every generator that a recorded op draws from."""
        return list(self._tracks)


_logs: WeakSet[GeneratorLog] = WeakSet()
_logs_lock = threading.Lock()


def _is_tag_of_another(log: GeneratorLog, generator: torch.Generator, state: Tensor) -> bool:
    """Whether a tape of another thread has tagged this state."""
    with _logs_lock:
        others = [other for other in _logs if other is not log]
    tracks = [other._tracks[generator] for other in others if generator in other._tracks]
    return any(_digest(state) in track.marks for track in tracks)


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that ops on `device` draw from when none is given."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    index = module.current_device() if device.index is None else device.index
    generator: torch.Generator = module.default_generators[index]
    return generator


def fingerprint(states: Iterable[Tensor]) -> str:
    """Return what tells apart sequences of states that give different numbers; tags do not count."""
    return blake2b(b"".join(_digest(_tagged(state, 0)) for state in states), digest_size=16).hexdigest()


def _digest(state: Tensor) -> bytes:
    return blake2b(state.numpy().tobytes(), digest_size=16).digest()


def _tagged(state: Tensor, tag: int) -> Tensor:
    if state.numel() != STATE_NBYTES:
        return state  # not an MT19937: told apart by its offset alone
    raw = bytearray(state.numpy().tobytes())
    _, left, _, position = HEADER.unpack_from(raw)
    if left != 1 and position == 0:
        return state  # word 0 is still to be drawn
    (word,) = struct.unpack_from("<I", raw, HEADER.size)
    struct.pack_into("<I", raw, HEADER.size, (word & ~_DEAD_BITS & 0xFFFFFFFF) | tag)
    return torch.frombuffer(raw, dtype=torch.uint8).clone()
