"""Saving and loading in the format of `torch.distributed.checkpoint`, by all ranks together."""

import pickle
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from gemini.errors import CheckpointError

from ..manifest import MANIFEST_NAME, FileRecord, Manifest
from ..module_loading import own_loading
from ..moment import Moment
from ..pairs import state_id_of, tell_loaded
from ..ranks import Crew, loaded_by_all, wait_for_saves
from ..shared_stage import SharedStage
from .load_planner import LoadPlanner
from .save_planner import SavePlanner
from .storage import Reader, Writer


def save(folder: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Save a model, and its optimizer, in the format of `torch.distributed.checkpoint`. All ranks call it.

    Each rank writes what it has at home into a file of its own. The names are those that
    `torch.distributed.checkpoint.state_dict.get_state_dict` gives, so that scripts without gemini load it::

        state = {"model": model.state_dict()}
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)

    Parameters
    ----------
    folder
        The folder to make, on a file system that all ranks share. It appears when it is whole.
    model
        Boosted, or plain where a single process trains it.
    optimizer
        What `Booster.boost` returned, or a `HybridAdam`; None: the model alone.

    Raises
    ------
    CheckpointError
        If the folder is not empty, cannot be written to, or is not the same on all ranks; or if the model or the
        optimizer has something that cannot be stored.
    RankError
        If it failed on another rank. There is no new folder then.
    TypeError
        If the optimizer is another one.
    """
    folder, crew = Path(folder).absolute(), Crew.of(model)
    doing = f"dcp.save to {folder}"
    moment = Moment.now(doing, [model, optimizer])
    with SharedStage(crew, folder.parent, folder.name, doing) as stage:
        crew.exchange(f"the start of {doing}", partial(_check_free, folder))
        files = write_into(stage.path, folder, crew, model, optimizer, doing)

        def commit() -> None:
            if crew.is_first:
                parts = {"model": ("",), **({} if optimizer is None else {"optimizer": ("",)})}
                state_id = state_id_of(model)
                id = secrets.token_hex(16) if state_id is None else state_id.text
                manifest = Manifest(id=id, world_size=crew.count, parts=parts, files=files)
                stage.write_text(MANIFEST_NAME, manifest.text())
                moment.check()
                stage.become(folder)

        crew.exchange(f"the end of {doing}", commit)


def load(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    strict: bool = True,
    verify: bool = True,
) -> None:
    """Load a model, and its optimizer, from a checkpoint of `torch.distributed.checkpoint`. All ranks call it.

    It may have been written by `save`, by FSDP2, or by a single process; by any number of ranks, with any chunk size.
    Each rank reads what it is to have at home. Everything is checked before the model is touched. No code is run.

    Parameters
    ----------
    folder
        Has a ``.metadata``.
    model, optimizer
        As in `save`.
    strict
        Whether missing and unexpected tensors of the model are an error. Shapes have to fit in any case.
    verify
        Compare files with the checksums of the manifest, where there is one, each rank a share of them.

    Raises
    ------
    CheckpointError
        Naming what is wrong. Model and optimizer are as they were, unless the message says otherwise.
    RankError
        If it failed on another rank.
    """
    folder, crew = Path(folder).absolute(), Crew.of(model)
    doing = f"dcp.load from {folder}"
    wait_for_saves(model, optimizer)
    loads: list[Callable[[], None]] = []

    def check() -> None:
        id = None
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            manifest.check(folder, verify=verify, share=(crew.index, crew.count))
            id = manifest.id
        loads.append(checked(folder, model, optimizer, strict=strict, id=id))

    def load() -> None:
        with loaded_by_all(model, doing):
            loads[0]()

    crew.exchange(f"the check of {doing}", check)
    crew.exchange(f"the last look at {doing}", load)


def checked(
    folder: Path, model: nn.Module, optimizer: Optimizer | None, *, strict: bool, id: str | None
) -> Callable[[], None]:
    """Check all that `load` checks, but for checksums.

    Parameters
    ----------
    id
        Of the state that was saved, if it is known.

    Returns
    -------
    Callable
        Loads it; all ranks are in a change that they have agreed upon.
    """
    if (own := own_loading(model)) is not None:
        raise CheckpointError(
            f"{folder} is loaded tensor by tensor, and {own}, which would be passed over: nothing was changed. Gather "
            "the state dict and give it to model.load_state_dict(...), or save with layout='hf'"
        )
    reader, planner = Reader(folder), LoadPlanner(model, optimizer, folder, strict=strict)
    metadata = reader.read_metadata()
    planner.set_up_planner({}, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.first_plan(), planner)
    planner.check()
    rest = planner.rest()

    def load() -> None:
        for each in (model, *(() if optimizer is None else (optimizer,))):
            tell_loaded(each, id)
        try:
            reader.read_data(rest, planner)
            planner.finish()
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{error}. The model is partly loaded: load a whole checkpoint into it") from error

    return load


def write_into(
    stage: Path, final: Path, crew: Crew, model: nn.Module, optimizer: Optimizer | None, doing: str
) -> dict[str, FileRecord]:
    """Write into an empty folder that all ranks see. All of them call it.

    Parameters
    ----------
    stage, final
        The folder, and where it will end up.
    crew
        The ranks.
    doing
        What this is, in words.

    Returns
    -------
    dict
        On the first rank, a record of each file; on the others nothing.
    """
    planner, writer = SavePlanner(model, optimizer, stores_ties=False), Writer(stage, final)
    planner.set_up_planner({}, None, crew.is_first)
    writer.set_up_storage_writer(crew.is_first)

    def plan() -> bytes:
        return pickle.dumps(writer.prepare_local_plan(planner.create_local_plan()))

    plans = [pickle.loads(each) for each in crew.exchange(f"the plan of {doing}", plan)]
    plans, metadata = planner.create_global_plan(plans)  # the same on all ranks: it follows from the plans
    plans = writer.prepare_global_plan(plans)

    def write() -> bytes:
        results = writer.write_data(planner.finish_plan(plans[crew.index]), planner).value()
        planner.finish()
        return pickle.dumps((results, writer.files.written))

    written = [pickle.loads(each) for each in crew.exchange(f"the files of {doing}", write)]
    if crew.is_first:
        writer.finish(metadata, _with_ties([results for results, _ in written], planner.ties(), metadata))
        records = [files for _, files in written]
        return _records([*records, writer.files.written])
    return {}


def _records(written: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, FileRecord]:
    found = {name: each for files in written for name, each in files.items()}
    return {name: FileRecord(nbytes, f"{crc:08x}") for name, (nbytes, crc) in found.items()}


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} is there, and is not replaced: give a new folder, or booster.save(folder, layout='dcp'), which "
            "numbers what it writes and keeps the last ones"
        )


def _with_ties(
    results: list[list[WriteResult]], ties: Mapping[str, Sequence[str]], metadata: Metadata
) -> list[list[WriteResult]]:
    """Let the other names of tied parameters stand for the same values, in results and metadata."""
    stored = metadata.state_dict_metadata
    stored.update({other: stored[name] for name, others in ties.items() for other in others})
    return [
        [
            *of_rank,
            *(
                replace(result, index=replace(result.index, fqn=other))
                for result in of_rank
                for other in ties.get(result.index.fqn, ())
            ),
        ]
        for of_rank in results
    ]
