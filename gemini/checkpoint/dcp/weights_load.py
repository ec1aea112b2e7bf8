"""Loading a model: what is stored for each of its tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from gemini.errors import CheckpointError

from ..hugging_face import may_be_missing
from ..names import extra_state_owner, left_out
from .pieces import Contents, Piece
from .reads import Arrivals, read_object
from .stored import StoredModel, form_of


class WeightsLoad:
    """A model that is loaded.

    Parameters
    ----------
    contents
        Of the model.
    metadata
        What is stored.
    folder
        Where, for messages.
    is_strict
        Whether missing and unexpected tensors are an error.

    Raises
    ------
    CheckpointError
        If something is missing or does not fit. Nothing has been changed.
    """

    def __init__(self, contents: Contents, metadata: Metadata, folder: Any, is_strict: bool) -> None:
        self._model = contents.model
        self._pieces: list[tuple[str, TensorStorageMetadata, Piece]] = []
        self._extras: dict[str, str] = {}
        """By the name under which it is stored: the module whose extra state it is."""
        self._values: dict[str, Any] = {}
        pieces = contents.weights()
        # Names as the model has them: the first part of a path is only ours.
        expected = {name: piece for piece in pieces for _, name in piece.paths}
        extras = {str(name) for _, name in contents.extras()}
        stored = StoredModel.of(metadata, [*map(str, expected), *extras])
        missing, misfits = [], []
        for piece in pieces:
            names = [str(name) for _, name in piece.paths]
            found = next((name for name in names if name in stored.names), None)
            if found is None:
                missing += [names[0]] if not may_be_missing(self._model, names[0]) else []
                continue
            form = form_of(metadata, stored.prefix + found)
            if form is None or tuple(form.size) != piece.shape:
                misfits.append(f"{found}: stored {_said(form)}, the model has {piece.shape}")
            elif form.properties.dtype.is_complex and not piece.dtype.is_complex:
                misfits.append(f"{found}: stored as {form.properties.dtype}, the model has {piece.dtype}")
            else:
                self._pieces.append((stored.prefix + found, form, piece))
        for name in extras:
            if name in stored.names:
                self._extras[stored.prefix + name] = name
            else:
                missing.append(name)
        missing += [entry.name for entry in left_out(self._model) if not may_be_missing(self._model, entry.name)]
        if is_strict and missing:
            misfits.append(f"missing ({len(missing)}): {', '.join(missing[:20])}")
        if is_strict and (unexpected := stored.unexpected([*map(str, expected), *extras])):
            misfits.append(f"unexpected ({len(unexpected)}): {', '.join(unexpected[:20])}")
        if misfits:
            raise CheckpointError(
                f"{folder} does not fit the model, which is as it was:\n    " + "\n    ".join(misfits[:40])
            )

    def small(self, arrivals: Arrivals) -> Iterator[ReadItem]:
        """What is read before the check."""
        return map(read_object, self._extras)

    def check(self, values: Mapping[str, Any]) -> None:
        """Take what has been read."""
        self._values = {name: values[name] for name in self._extras}

    def large(self, arrivals: Arrivals) -> Iterator[ReadItem]:
        """What is read into its places."""
        for name, form, piece in self._pieces:
            yield from arrivals.plan(name, form, piece)

    def finish(self) -> None:
        """Put extra states into their places."""
        for name, module in self._extras.items():
            extra_state_owner(self._model, module).set_extra_state(self._values[name])


def _said(form: TensorStorageMetadata | None) -> str:
    return "as something that is no tensor" if form is None else f"with shape {tuple(form.size)}"
