"""What a lease says: who holds it, and what it asks and has of each memory."""

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder

HOST, DEVICE, DISK = "host", "device", "disk"
VERSION = 1


class Seen(Struct, frozen=True):
    """A limit as the holder saw it last."""

    name: str
    free: int
    total: int


class Holding(Struct, frozen=True, kw_only=True):
    """One memory of a lease; all numbers are bytes."""

    pools: tuple[str, ...]
    """The limits that bound it, as `gemini.lease.limits.Limit.pool` names them."""
    seen: dict[str, Seen] = {}
    """By pool, those that others cannot read for themselves: of devices and disks."""
    floor: int
    """What the holder needs at least."""
    wish: int
    """What it can make use of."""
    held: int
    """What it may take, now: promised to it."""
    used: int = 0
    """What its model data take now."""
    grown: int = 0
    """What its process was seen to have taken since the lease began."""


class Answer(Struct, frozen=True):
    """What became of something that was asked of a holder."""

    id: str
    is_done: bool
    text: str


class Standing(Struct, frozen=True, kw_only=True):
    """One lease."""

    v: int = VERSION
    job: str
    """The same text for all ranks of a training."""
    program: str
    pid: int
    namespace: int = 0
    """In which the process id counts."""
    started: float
    """Seconds since the epoch."""
    rank: int = 0
    ranks: int = 1
    """Of the training on this machine."""
    base_bytes: int = 0
    """RAM of the process when the lease began, without pages of files."""
    is_waiting: bool = False
    """The holder has asked, and has not begun yet."""
    holdings: dict[str, Holding] = {}
    """By memory: host, device, disk."""
    answer: Answer | None = None


_encoder = Encoder()
_decoder = Decoder(Standing)


def encoded(standing: Standing) -> bytes:
    """One line of JSON."""
    return _encoder.encode(standing) + b"\n"


def decoded(text: bytes) -> Standing | None:
    """What a lease says; None for what is torn, newer or not ours."""
    try:
        found = _decoder.decode(text)
    except (DecodeError, ValidationError):
        return None
    return found if found.v == VERSION else None
