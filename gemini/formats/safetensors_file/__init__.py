"""safetensors files as bytes: their header, and checksums of their tensors. Needs no torch.

::

    verify.py                are all tensors as they were written?
    header.py                what is in the file, where, under which checksum
    crc.py                   CRC-32 of parts put together
"""

from .crc import Sums, combined
from .header import HEADER_LIMIT_BYTES, TENSORS_LIMIT, Header, Malformed, StoredTensor, Unsealed, read_header
from .verify import damaged

__all__ = [
    "HEADER_LIMIT_BYTES",
    "TENSORS_LIMIT",
    "Header",
    "Malformed",
    "StoredTensor",
    "Sums",
    "Unsealed",
    "combined",
    "damaged",
    "read_header",
]
