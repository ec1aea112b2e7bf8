"""Saving while training goes on (``use_async=True``).

The files are listed on the training thread, and all that is not in chunks (buffers, step counts, groups, parameters
that are in no chunk) is copied there at once. Values in chunks are written by a thread of their own, which finds them
as they were at the call: whatever is about to change them copies them aside first (`gemini.chunk.snapshot`), or waits
where copies have no room left (``GeminiPlugin(snapshot_memory=...)``). So the files are those of a save without
``use_async`` at the same place, bit by bit.

A save that fails leaves the checkpoint that was there before. Its error is raised once, by the next call of the booster
for this model, or by the next backward or step, which has changed nothing then and can be called again; where there is
none, it is logged. The next save or load, ``booster.wait_until_finished()`` and the end of the process wait for it.

These are written before the call returns: files of ``torch.save``, models of several ranks, parts of several boosted
models or of none, and what is not in chunks and has no room.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import torch

from gemini.chunk import Chunk, ChunkManager
from gemini.errors import CheckpointError, OutOfMemory

from .contents import Bytes, Content, Inside, Saving, Tensors, TorchFile, UnreadTensor
from .moment import Moment
from .names import InChunk
from .ranks import together_of, wait_for_saves
from .tensor_parallel import is_divided
from .together_saved import Listed, write_together

logger = logging.getLogger(__name__)


def save(of: Any, doing: str, listed: Listed, use_async: bool) -> None:
    """Write files of one object, now or in the background.

    Parameters
    ----------
    of
        The model or optimizer.
    doing
        What this is, in words.
    listed
        Lists the files, divided among the ranks that write them.
    """
    wait_for_saves(of)
    moment = Moment.now(doing, [of])
    if use_async:
        with moment.kept():
            if save_in_background([of], doing, listed):
                return
    write_together(of, doing, moment.checked(listed))


def save_in_background(objects: Sequence[Any], doing: str, listed: Listed) -> bool:
    """Begin to write files of these objects, which live until they are written; False if it is impossible."""
    if any(together_of(each) is not None or is_divided(each) for each in objects):
        return False
    wait_for_saves(*objects)
    saving = listed((0,))
    places = [place for content in saving.contents for each in _tensors(content) for place in each.in_chunks]
    managers = {id(place.manager): place.manager for place in places}
    nbytes = sum(map(_taken_nbytes, saving.contents))
    if len(managers) != 1:
        return False
    (manager,) = managers.values()
    if nbytes > manager.snapshots.limit_bytes:
        return False
    contents = [_taken(content) for content in saving.contents]
    work = partial(_work, objects, doing, replace(saving, contents=contents))
    try:
        manager.snapshots.begin(_wanted(manager, places), work, nbytes)
    except OutOfMemory as error:
        logger.warning("%s is done before training goes on: %s", doing, error)
        return False
    return True


def _work(objects: Sequence[Any], doing: str, saving: Saving) -> None:
    """Runs in the background. It gets ``objects`` to keep them."""
    try:
        saving.run()
    except Exception as error:
        raise CheckpointError(f"{doing}, in the background, failed: {error}") from error


def _wanted(manager: ChunkManager, places: Iterable[InChunk]) -> dict[Chunk, dict[int, list[str]]]:
    wanted: dict[Chunk, dict[int, list[str]]] = {}
    for _, parameter, name in places:
        place = manager.find(parameter)
        assert place is not None
        wanted.setdefault(place[0], {}).setdefault(place[1], []).append(name)
    return wanted


def _taken_nbytes(content: Content) -> int:
    return sum(each.record.nbytes for each in _tensors(content) if not each.in_chunks)


def _tensors(content: Content) -> Sequence[UnreadTensor]:
    if isinstance(content, Inside):
        return _tensors(content.content)
    return content.tensors if isinstance(content, Tensors) else ()


def _taken(content: Content) -> Content:
    """The same with all that is not in chunks read now, into memory that nothing changes."""
    if isinstance(content, Inside):
        return Inside(content.folder, _taken(content.content))
    if isinstance(content, Tensors):
        return replace(content, tensors=[_taken_tensor(each) for each in content.tensors])
    if isinstance(content, TorchFile):
        file = BytesIO()
        torch.save(content.read(), file)
        return Bytes(content.name, file.getvalue())
    return content


def _taken_tensor(tensor: UnreadTensor) -> UnreadTensor:
    if tensor.in_chunks:
        return tensor
    value = tensor.read().clone()
    return replace(tensor, read=lambda: value, open=lambda: None)
