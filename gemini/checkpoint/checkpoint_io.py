"""Saving and loading all that a training run consists of as one checkpoint, which is committed or is not there."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from .background import save_in_background
from .contents import Content, Saving
from .given_parts import Part
from .prepared import Prepared, own_files
from .ranks import checked_by_all, loaded_by_all, place_of, together_of, told_by_all, wait_for_saves, write_once
from .stored import Stored
from .weight_files import size_limit


def save_checkpoint(
    folder: str | Path,
    parts: Sequence[Part],
    *,
    extra: Any = None,
    keep: int | None = 3,
    size_per_shard: int | str,
    use_async: bool = False,
) -> Path:
    """Write everything as one checkpoint, and commit it.

    Parameters
    ----------
    size_per_shard
        Of files of tensors, at most: MiB as a number, or ``"5GB"``.

    Returns
    -------
    Path
        The folder of the checkpoint, absolute; where it is written in the background, the one that it will be in.

    See `gemini.booster.Booster.save` for the rest.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep is how many checkpoints stay, 1 or more, or None for all; got {keep!r}")
    limit = size_limit(size_per_shard)
    path = Path(folder).absolute()
    leader = _leaders(parts)[0]
    doing = f"booster.save to {path}"
    wait_for_saves(*(part.value for part in parts))
    own = told_by_all(leader, doing, lambda: own_files(parts, place_of(leader)[0]))
    committed_as: list[str] = []

    def listed() -> Saving:
        prepared = Prepared.of(parts, own, extra, limit)

        def write(contents: Sequence[Content]) -> None:
            committed_as.append(str(replace(prepared, contents=contents).write(path, keep)))

        return Saving(prepared.contents, write)

    if use_async and save_in_background([part.value for part in parts], doing, listed):
        return path
    write_once(leader, doing, lambda: listed().run())
    (name, *_) = told_by_all(leader, f"the end of {doing}", lambda: {"path": "".join(committed_as)})
    return Path(str(name["path"]))


def load_checkpoint(
    path: str | Path, parts: Sequence[Part], *, strict: bool = True, verify: bool = True, rng: bool = True
) -> Any:
    """Read a checkpoint into the parts; returns what was saved as ``extra``.

    See `gemini.booster.Booster.load`.
    """
    leaders = _leaders(parts)
    doing = f"booster.load from {path}"
    wait_for_saves(*(part.value for part in parts))
    with ExitStack() as files:
        with checked_by_all(leaders[0], doing):
            stored = Stored.at(Path(path).absolute(), verify)
            loads = stored.checked(parts, files, place_of(leaders[0]), strict=strict, rng=rng)
            extra = stored.extra()
        with ExitStack() as changes:
            for leader in leaders:
                changes.enter_context(loaded_by_all(leader, doing))
            for load in loads:
                load()
    return extra


def _leaders(parts: Sequence[Part]) -> list[Any]:
    """One object of each group of ranks that keeps some of the parts together; any object where there is none."""
    found = {id(group): part.value for part in reversed(parts) if (group := together_of(part.value)) is not None}
    return [*found.values()][::-1] or [None]
