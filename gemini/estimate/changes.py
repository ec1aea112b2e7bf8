"""Changes with which a run that ran out of memory would have had enough, the cheapest first.

Where the model is known, all of a step is asked of the estimate: model data by the trainer's packing, activations by a
run on fake tensors. Where it is not, the records know the parameters, and packing says whether they have room; what
another batch would take is not known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from gemini.chunk import BufferSpec
from gemini.config import GeminiConfig
from gemini.sizes import format_bytes

from .activations import Activations
from .demand import Demand, Machine, ModelData, arguments, demand, with_machine
from .solve import solve_batch_size, solve_memory, solve_seq_len
from .subject import Subject

MOST_DISK_BYTES = 1 << 50


class Check(Enum):
    """Who said that a change is enough."""

    ESTIMATE = "estimate"
    """Model data, activations and temporaries of the whole step."""
    PACKING = "packing"
    """The trainer's packing, of model data; not what activations take."""
    NOTHING = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that would have made it fit."""

    text: str
    arguments: str | None = None
    """Of `GeminiPlugin`."""
    check: Check = Check.NOTHING
    batch_size: int | None = None
    seq_len: int | None = None
    checkpointing: bool | None = None
    ram_bytes: int | None = None
    """What to train with; None: as before."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What ran out of memory."""

    subject: Subject
    config: GeminiConfig
    slots: tuple[BufferSpec, ...]
    numel: int
    """Of all parameters that were recorded."""
    machine: Machine
    batch_size: int
    seq_len: int
    is_text: bool
    """Its second dimension is a length that may be shorter."""
    checkpointing: bool
    offload_dir: str | None


def estimated(case: Case) -> Iterator[Change]:
    """What the estimate says is enough; it is asked about a change when the one before has been taken.

    Raises
    ------
    ValueError
        If this is not the model that ran out.
    """
    data = ModelData(case.subject, case.config, case.slots)
    if data.numel != case.numel:
        raise ValueError(f"{case.subject.name} has {data.numel} parameters, and the run's model had {case.numel}")
    activations = Activations(case.subject, case.config.dtype_of(torch.float32), case.checkpointing)
    non_model = activations.peak_bytes(case.batch_size, case.seq_len)
    yield from _as_it_is(case, demand(data, non_model, case.machine))
    yield from _recomputed(case, data)
    yield from _on_disk(case, data, non_model)
    size = solve_batch_size(data, activations, case.machine, case.seq_len, case.batch_size - 1)
    if size:
        found = demand(data, activations.peak_bytes(size, case.seq_len), case.machine)
        text = f"batches of {size} instead of {case.batch_size} (accumulate gradients of several to train as before)"
        yield _change(case, text, found, batch_size=size)
    if case.is_text:
        length = solve_seq_len(data, activations, case.machine, case.batch_size, most=case.seq_len - 1)
        if length:
            found = demand(data, activations.peak_bytes(case.batch_size, length), case.machine)
            yield _change(case, f"sequences of {length} instead of {case.seq_len}", found, seq_len=length)
    yield from _more_memory(case, data, non_model)


def _as_it_is(case: Case, found: Demand) -> Iterator[Change]:
    if found.fits:
        yield _change(case, "the same training with less memory for model data, which leaves activations enough", found)


def _recomputed(case: Case, data: ModelData) -> Iterator[Change]:
    if case.checkpointing:
        return
    try:
        activations = Activations(case.subject, case.config.dtype_of(torch.float32), checkpointing=True)
    except TypeError:  # it cannot be switched on from outside
        return
    found = demand(data, activations.peak_bytes(case.batch_size, case.seq_len), case.machine)
    if found.fits:
        text = "recompute activations in backward (model.gradient_checkpointing_enable()); a step takes a third longer"
        yield _change(case, text, found, checkpointing=True)


def _on_disk(case: Case, data: ModelData, non_model: int) -> Iterator[Change]:
    with_disk = with_machine(case.machine, disk_bytes=MOST_DISK_BYTES)
    if not demand(data, non_model, with_disk).fits or demand(data, non_model, case.machine).fits:
        return
    nbytes = solve_memory(data, non_model, case.machine, "disk")
    if nbytes:
        found = demand(data, non_model, with_machine(case.machine, disk_bytes=nbytes))
        yield _change(case, f"{format_bytes(nbytes)} of disk for model data", found)


def _more_memory(case: Case, data: ModelData, non_model: int) -> Iterator[Change]:
    if case.machine.device_bytes is not None:
        return
    nbytes = solve_memory(data, non_model, case.machine, "host")
    if nbytes:
        found = demand(data, non_model, with_machine(case.machine, ram_bytes=nbytes))
        there_was = format_bytes(case.machine.ram_bytes)
        text = f"{format_bytes(nbytes)} of RAM for this training; there was {there_was}"
        yield _change(case, text, found, ram_bytes=nbytes)


def _change(case: Case, text: str, found: Demand, **different: Any) -> Change:
    pasted = arguments(found, case.config, case.offload_dir)
    return Change(text=text, arguments=pasted, check=Check.ESTIMATE, **different)
