"""Running averages of a model (`gemini.EMA`) in a checkpoint: a file for each, with the names of the model's tensors.

What is not averaged (buffers, parameters that are not trained) is in the file as the model has it, so that the file is
one of weights, like ``model.safetensors``. Its metadata say how many steps it has taken in.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gemini.errors import CheckpointError

from ..boosted import boosted, is_boosted
from ..formats import listed, shown
from ..updates.averages import Average
from .contents import Content, Tensors, UnreadTensor
from .match import Source, match
from .names import Entry, InChunk, entries
from .optimizer_files import TENSORS_NAME
from .safetensors_stream import OpenFiles, TensorRecord
from .tensor_parallel import cut, gathered
from .weight_files import SAFE_NAME

_COUNT_KEY = "gemini_memory.n_averaged"
_KIND_KEY = "gemini_memory.average"
"""``EMA`` or ``SWA``."""
_OPTION_PREFIX = "gemini_memory.average."
_SUFFIX = ".safetensors"
RESERVED_NAMES = frozenset(Path(file).stem for file in (SAFE_NAME, TENSORS_NAME))
"""Names that no average can have: the files would be those of other parts."""


def average_contents(model: nn.Module, rank: int) -> list[Content]:
    """The files of a boosted model's averages, unread, for this rank to write.

    Raises
    ------
    RuntimeError
        While the model has the values of one.
    """
    if is_boosted(model):
        boosted(model).step.averages.refuse_swapped("save a checkpoint of a training run")
    return [
        Tensors(
            average.name + _SUFFIX,
            [_unread(entry, average) for entry in entries(model)],
            {"format": "pt", _COUNT_KEY: str(average.count), **_form_metadata(average)},
            rank,
        )
        for average in averages_of(model)
    ]


def checked_averages(
    model: nn.Module, find: Callable[[str], Path | None], files: OpenFiles
) -> list[Callable[[], None]]:
    """Check the files of a boosted model's averages; returns what loads them.

    Parameters
    ----------
    find
        From the name of a file to its path; None if it is not to be loaded.
    files
        Takes what has to stay open until it is loaded; it holds nothing else.
    """
    loads: list[Callable[[], None]] = []
    for average in averages_of(model):
        if (path := find(average.name + _SUFFIX)) is None:
            continue
        file = files.open(path)
        count = file.metadata.get(_COUNT_KEY, "")
        if not (count.isascii() and count.isdecimal()):
            raise CheckpointError(f"{path} does not say how many steps its average has taken in ({_COUNT_KEY})")
        _check_kind(average, path, file.metadata)
        stored = {name: Source(r.shape, r.dtype, partial(file.read, name)) for name, r in file.records.items()}
        found = match(model, stored)
        found.check(True, str(path))
        loads.append(partial(_load, average, found.pairs, int(count)))
    return loads


def warn_of_left_out(model: nn.Module, stored: Iterable[str], what: str) -> None:
    """Warn if a checkpoint has averages that are not there to be loaded: made later, they would begin anew.

    Parameters
    ----------
    stored
        Names of files, of the model and others.
    what
        The checkpoint.
    """
    if not is_boosted(model) or boosted(model).optimizer is None:
        return  # it can have no average
    here = {average.name for average in averages_of(model)}
    names = [Path(file).stem for file in stored if Path(file).suffix == _SUFFIX]
    if left := [name for name in names if name.isidentifier() and name not in here | RESERVED_NAMES]:
        warnings.warn(
            f"{what} has the running averages {listed(left)}, and the model has none of that name: one that is made "
            f"after booster.load begins anew. To go on with it, make it before: gemini.EMA(model, decay, "
            f"name={left[0]!r}), or gemini.SWA",
            stacklevel=2,
        )


def averages_of(model: nn.Module) -> list[Average]:
    """The averages that follow a model."""
    return list(boosted(model).step.averages) if is_boosted(model) else []


def _form_metadata(average: Average) -> dict[str, str]:
    options = {_OPTION_PREFIX + name: repr(value) for name, value in average.form.options.items()}
    return {_KIND_KEY: average.form.kind, **options}


def _check_kind(average: Average, path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse the values of another kind of average; a decay may differ, as options of an optimizer may."""
    here, stored = average.form.kind, metadata.get(_KIND_KEY, average.form.kind)
    if stored != here:
        options = [
            f"{key.removeprefix(_OPTION_PREFIX)}={shown(value)}"
            for key, value in metadata.items()
            if key.startswith(_OPTION_PREFIX)
        ]
        made = ", ".join(["model", *options, f"name={average.name!r}"])
        raise CheckpointError(
            f"{path} holds an average of the kind {shown(stored)}, and {average.name} of the model is of the kind "
            f"{here}, which goes on in another way. Make it as it was, with gemini.{shown(stored)}({made}), or with "
            "another name to begin anew. Nothing was changed"
        )


def _unread(entry: Entry, average: Average) -> UnreadTensor:
    record = TensorRecord(entry.name, entry.dtype, entry.shape)
    if _follows(average, entry):
        assert entry.values is not None
        in_chunk = InChunk(entry.values.manager, entry.tensor, average.name)
        return UnreadTensor(record, partial(_read, entry, average.name), (in_chunk,))
    if (plain := average.plain.get(entry.tensor)) is not None:
        return UnreadTensor(record, partial(plain.to, "cpu", copy=True))
    return UnreadTensor(record, entry.read, entry.in_chunks)


def _read(entry: Entry, name: str) -> Tensor:
    assert entry.values is not None
    return gathered(entry.name, entry.tensor, entry.values.read(entry.tensor, name))


def _follows(average: Average, entry: Entry) -> bool:
    """True if chunks have the average of a tensor."""
    place = None if entry.values is None else entry.values.manager.find(entry.tensor)
    return place is not None and average.name in place[0].specs


def _load(average: Average, pairs: Sequence[tuple[Entry, Source]], count: int) -> None:
    for entry, source in pairs:
        if _follows(average, entry):
            assert entry.values is not None
            entry.values.write(entry.tensor, average.name, cut(entry.tensor, source.read()))
        elif (plain := average.plain.get(entry.tensor)) is not None:
            with torch.no_grad():
                plain.copy_(source.read())
    average.restore(count)
