"""Real text as training data: bytes, and batches that depend on nothing but the seed and the step."""

from pathlib import Path

import torch
from torch import Tensor

_STRIDE = 1_000_003  # more steps than any run takes, so that no two (seed, step) share a generator's seed


class Corpus:
    """A text, byte by byte (a vocabulary of 256).

    Parameters
    ----------
    content
        The text.
    name
        Where it is from, for people.
    """

    def __init__(self, content: bytes, name: str) -> None:
        self.name = name
        self._bytes = torch.frombuffer(bytearray(content), dtype=torch.uint8)

    @classmethod
    def load(cls, path: Path | None) -> "Corpus":
        """The file, or the Python reference that ships with every Python.

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            It is empty.
        """
        if path is not None:
            content = path.read_bytes()
            if not content:
                raise ValueError(f"{path} is empty")
            return cls(content, path.name)
        from pydoc_data.topics import topics

        return cls("\n\n".join(topics[name].strip() for name in sorted(topics)).encode(), "the Python reference")

    def __len__(self) -> int:
        return self._bytes.numel()

    def check(self, seq_len: int) -> None:
        """Raise ``ValueError`` if the text has no sequence of that length with a next byte for each."""
        if len(self) <= seq_len:
            raise ValueError(f"{self.name} has {len(self)} bytes; sequences of {seq_len} need at least {seq_len + 1}")

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets ``[batch_size, seq_len]`` of a step: random places, the same for the same arguments."""
        generator = torch.Generator().manual_seed((seed * _STRIDE + step) % 2**63)
        starts = torch.randint(len(self) - seq_len, (batch_size, 1), generator=generator)
        windows = self._bytes[starts + torch.arange(seq_len + 1)].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
