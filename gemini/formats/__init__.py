"""The files of checkpoints as bytes: headers, directories, checksums. Without torch, so that `gemini-stat` reads them.

What is not whole is `Damaged`; `gemini.checkpoint` makes a ``CheckpointError`` of it.
"""

from .damage import Damaged, Unreadable, listed, shown

__all__ = ["Damaged", "Unreadable", "listed", "shown"]
