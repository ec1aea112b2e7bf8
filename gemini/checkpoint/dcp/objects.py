"""What is no tensor in a checkpoint: plain values, as ``torch.save`` writes them, read without running code."""

import io
from typing import Any

import torch

from gemini.errors import CheckpointError


def stored_object(name: str, value: Any) -> bytes:
    """The bytes of a value.

    Raises
    ------
    CheckpointError
        If they would not load again.
    """
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    except Exception as error:  # pickle, and what a value raises when it is pickled
        raise CheckpointError(
            f"{name} is a {type(value).__name__} that holds more than plain values, and would not load again: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error
    return stream.getvalue()


def loaded_object(name: str, stored: io.BytesIO, where: Any) -> Any:
    """The value.

    Raises
    ------
    CheckpointError
        If it is damaged, or holds more than plain values.
    """
    try:
        return torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zip and pickle each have their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{where}: {name} is damaged, or holds more than plain values: {reason}") from error
