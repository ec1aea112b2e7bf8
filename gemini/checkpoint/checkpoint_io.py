"""Saving and loading all that a training run consists of as one checkpoint, which is committed or is not there."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gemini.errors import CheckpointError, RankError

from . import committed
from .averages import averages_of
from .background import save_in_background
from .committed import STAGE_NAME
from .contents import Saving, write_all
from .given_parts import MODEL, OPTIMIZER, Part, pairs
from .manifest import MANIFEST_NAME, FileRecord
from .moment import Moment
from .names import refuse_left_out
from .optimizer_check import check_options
from .prepared import Prepared, own_files
from .ranks import Crew, loaded_by_all, together_of, wait_for_saves
from .shared_stage import SharedStage
from .stage import Stage
from .stored import Stored
from .swapped import refuse_swapped
from .together_saved import write_together
from .weight_files import size_limit

HF, DCP = "hf", "dcp"
LAYOUTS = (HF, DCP)


def save_checkpoint(
    folder: str | Path,
    parts: Sequence[Part],
    *,
    extra: Any = None,
    keep: int | None = 3,
    size_per_shard: int | str,
    use_async: bool = False,
    layout: str = "hf",
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
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    limit = size_limit(size_per_shard)
    path = Path(folder).absolute()
    committed.refuse_committed(path)
    if committed.is_checkpoint(path):
        raise ValueError(f"{path} has a {MANIFEST_NAME} of something else: give a folder of its own for checkpoints")
    leader = _leaders(parts)[0]
    doing = f"booster.save to {path}"
    for part in parts:
        if part.kind == MODEL:
            refuse_left_out(part.value)
        if part.kind == OPTIMIZER:
            check_options(part.value, doing)
    values = [part.value for part in parts]
    wait_for_saves(*values)
    crew = Crew.of(leader)
    if layout == DCP:
        return _save_distributed(path, parts, crew, extra, keep, doing)
    moment = Moment.now(doing, values)
    committed_as: list[str] = []

    def listed(own: Sequence[Mapping[str, bytes]], writers: Sequence[int]) -> Saving:
        prepared = Prepared.of(parts, own, extra, limit, writers)

        def commit(stage: Stage) -> None:
            committed_as.append(str(prepared.commit(stage, keep, {})))

        return Saving(prepared.contents, path, STAGE_NAME, commit)

    with moment.kept() if use_async else nullcontext():
        own = crew.exchange(doing, lambda: own_files(parts, crew.index))
        if use_async and save_in_background(values, doing, partial(listed, own)):
            return path
    write_together(leader, doing, moment.checked(partial(listed, own)))
    (name, *_) = crew.exchange(f"the end of {doing}", lambda: "".join(committed_as))
    return Path(name)


def _save_distributed(path: Path, parts: Sequence[Part], crew: Crew, extra: Any, keep: int | None, doing: str) -> Path:
    """Each rank writes what it has at home of models and optimizers; the first one writes the rest, and commits."""
    from . import dcp  # takes a second to import

    if averages := [average.name for part in parts if part.kind == MODEL for average in averages_of(part.value)]:
        raise ValueError(
            f"layout='dcp' holds no running averages, and the model has {', '.join(averages)}: save with layout='hf', "
            "or save average.state_dict() beside it and call average.close()"
        )
    found = pairs(parts)
    others = [part for part in parts if part.kind not in (MODEL, OPTIMIZER)]
    names = {kind: tuple(part.name for part in parts if part.kind == kind) for kind in (MODEL, OPTIMIZER)}
    moment = Moment.now(doing, [part.value for part in parts])
    own = crew.exchange(doing, lambda: own_files(parts, crew.index))
    with SharedStage(crew, path, committed.STAGE_NAME, doing) as stage:
        records: dict[str, FileRecord] = {}
        for name, model, optimizer in found:
            (stage.path / name).mkdir(exist_ok=True)
            written = dcp.write_into(stage.path / name, path, Crew.of(model), model, optimizer, doing)
            records |= {f"{name}/{file}" if name else file: record for file, record in written.items()}

        def commit() -> str:
            if not crew.is_first:
                return ""
            prepared = Prepared.of(others, own, extra, 1)
            kinds = {kind: of for kind, of in names.items() if of}
            write_all(stage.stage, prepared.contents)
            moment.check()
            return str(replace(prepared, parts={**prepared.parts, **kinds}).commit(stage.stage, keep, records))

        committed_as = crew.exchange(f"the end of {doing}", commit)[0]
    return Path(committed_as)


def load_checkpoint(
    path: str | Path, parts: Sequence[Part], *, strict: bool = True, verify: bool = True, rng: bool = True
) -> Any:
    """Read a checkpoint into the parts; returns what was saved as ``extra``.

    See `gemini.booster.Booster.load`.
    """
    leaders = _leaders(parts)
    crew = Crew.of(leaders[0])
    doing = "booster.load"  # the folder may have another path on each machine
    wait_for_saves(*(part.value for part in parts))
    with ExitStack() as files:
        loads: list[Callable[[], None]] = []
        extra: list[Any] = []

        def check() -> str:
            refuse_swapped(doing, *(part.value for part in parts))
            folder = committed.find(Path(path).absolute())
            try:
                stored = Stored.at(folder, verify, (crew.index, crew.count))
                checked = stored.checked(parts, files, (crew.index, crew.count), strict=strict, rng=rng)
                extra.append(stored.extra())
            except CheckpointError:
                if committed.find(Path(path).absolute()) == folder:
                    raise
                return check()  # another process has saved, and removed what was the newest one
            loads.extend(checked)
            return f"{stored.folder} ({stored.manifest.id})"

        found = crew.exchange(f"the check of {doing}", check)
        if len({each.rpartition(" ")[2] for each in found}) > 1:
            raise RankError(
                "the ranks have found different checkpoints, and none was loaded: "
                + ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(found))
                + ". Give all ranks the same one, by its name"
            )
        with ExitStack() as changes:
            for leader in leaders:
                changes.enter_context(loaded_by_all(leader, doing))
            for load in loads:
                load()
    return extra[0]


def _leaders(parts: Sequence[Part]) -> list[Any]:
    """One object of each group of ranks that keeps some of the parts together; any object where there is none."""
    found = {id(group): part.value for part in reversed(parts) if (group := together_of(part.value)) is not None}
    return [*found.values()][::-1] or [None]
