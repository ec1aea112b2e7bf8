"""safetensors files as bytes: their header, and checksums of their tensors. Needs no torch.

::

    verify.py                are all tensors as they were written?
    header.py  team.py       what is in the file, where, under which checksum; threads that share the work
    crc.py                   CRC-32 of parts put together
"""

from .crc import Sums, combined
from .header import HEADER_LIMIT_BYTES, TENSORS_LIMIT, Header, Malformed, StoredTensor, Unsealed, read_header
from .team import Team
from .verify import damaged

__all__ = [
    "HEADER_LIMIT_BYTES",
    "TENSORS_LIMIT",
    "Header",
    "Malformed",
    "StoredTensor",
    "Sums",
    "Team",
    "Unsealed",
    "combined",
    "damaged",
    "read_header",
]
