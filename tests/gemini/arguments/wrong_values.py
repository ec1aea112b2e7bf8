"""Values that no argument of a kind may have, by kind."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAN, INF, HUGE = float("nan"), float("inf"), 2**80
TENSOR = torch.tensor([1.0, 2.0])

FLAGS: tuple[Any, ...] = ("False", "", b"1", 2, -1, 0.5, NAN, None, [], TENSOR, HUGE)
WHOLES: tuple[Any, ...] = ("2", "", b"2", True, 2.5, 2.0, NAN, INF, -1, [2], TENSOR, HUGE)
NUMBERS: tuple[Any, ...] = ("0.5", "", b"1", True, NAN, INF, -1.0, None, [0.5], TENSOR, 10**400, 1j)
CHOICES: tuple[Any, ...] = ("x", "", b"auto", 1, True, NAN, ["auto"], TENSOR, HUGE)
SIZES: tuple[Any, ...] = (
    "many", "", "-1", "1e9", "0", 0, -1, 1.5, NAN, INF, b"1GiB", True, [1], TENSOR, HUGE, "99999999TiB", np.float64(1),
)  # fmt: skip
SIZES_NOT_ZERO = tuple(value for value in SIZES if not (type(value) in (int, str) and str(value) == "0"))
OBJECTS: tuple[Any, ...] = ("x", "", b"x", 1, True, NAN, [], TENSOR, object)


@dataclass(frozen=True)
class Places:
    """Paths that cannot be folders."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> "Places":
        (folder / "file").write_text("")
        (folder / "loop").symlink_to(folder / "loop")
        return cls(folder)

    def names(self) -> tuple[Any, ...]:
        """Nothing that could name a file or a folder."""
        return "", b"there", 7, NAN, [], TENSOR, HUGE, "a\0b", Path("a\0b"), "x" * 5000

    def folders(self) -> tuple[Any, ...]:
        folder = self.folder
        return (
            *self.names(), folder / "file", str(folder / "file" / "x"), folder / "loop", f"{folder}/loop/x",
        )  # fmt: skip


def shown(value: Any) -> str:
    """As a part of a test's name."""
    text = type(value).__name__ if isinstance(value, torch.Tensor | Path) else ascii(value)
    return text if len(text) < 30 else f"{text[:27]}..."
