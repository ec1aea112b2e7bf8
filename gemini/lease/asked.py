"""What users and schedulers ask of a run that trains: other budgets."""

import secrets

from msgspec import DecodeError, Struct, ValidationError
from msgspec.json import Decoder, Encoder


class Asked(Struct, frozen=True, kw_only=True):
    """Bytes that a run is to have of each memory from its next step on; None leaves one as it is."""

    id: str
    host: int | None = None
    device: int | None = None
    disk: int | None = None

    @classmethod
    def of(cls, host: int | None = None, device: int | None = None, disk: int | None = None) -> "Asked":
        """With an id that no other has."""
        return cls(id=secrets.token_hex(8), host=host, device=device, disk=disk)

    @property
    def nbytes(self) -> dict[str, int]:
        """By memory, those that are to change."""
        pairs = (("host", self.host), ("device", self.device), ("disk", self.disk))
        return {memory: nbytes for memory, nbytes in pairs if nbytes is not None}


def as_text(asked: Asked) -> bytes:
    return Encoder().encode(asked)


def from_text(text: bytes) -> Asked | None:
    """None for what is torn or not ours."""
    try:
        return Decoder(Asked).decode(text)
    except (DecodeError, ValidationError):
        return None
