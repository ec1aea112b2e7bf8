"""Checkpoints: weights in the Hugging Face layout, optimizer states, schedulers; streamed, atomic, without pickle.

How the files build on each other (imports go down only)::

    checkpoint_io.py                                          all of a training run, committed at once
    prepared.py  stored.py                           a checkpoint before it is written; one that is there
    given_parts.py  random_states.py  run_files.py   its parts; their names
    model_io.py  optimizer_io.py  scheduler_io.py  lora.py    its parts, each by itself
    torch_stream.py  unread.py                       files of torch.save, one tensor at a time
    committed.py  manifest.py  pairs.py              the checkpoints of a folder; the files of one; which go together
    hugging_face.py  conversion.py  weight_files.py  configuration and names of transformers; files
    background.py                                    a thread that writes files while training goes on
    moment.py                                        whether what was saved is of one state
    model_contents.py  optimizer_contents.py         the files of a model, of an optimizer
    contents.py                                      files that are to be written
    optimizer_check.py  scheduler_state.py           whether what was saved fits, before anything changes
    optimizer_files.py  optimizer_view.py            the format of a saved optimizer; what is asked of one
    bitsandbytes.py  colossalai_optimizer.py         forms in which other tools save weights and states
    parts.py  module_loading.py                      what a part of a boosted model gathers and loads; users' hooks
    match.py                                         which stored tensor goes where, checked before anything changes
    names.py                                         what a model holds, one tensor at a time
    filling.py                                       from files straight to where values are
    safetensors_stream.py  torch_file.py             formats
    together_saved.py  shared_stage.py  ranks.py     several ranks: who writes, into one stage, all or none
    division.py                                      which rank writes which tensors
    moves.py  blocks.py  flat_values.py              between a file and where values are, in parts, by threads
    stage.py  output.py  progress.py  raw.py         atomic files, one file, how far it is, bytes

``dcp`` has another format, that of `torch.distributed.checkpoint`, and is imported when it is needed.
"""

from .averages import check_name_of_average
from .checkpoint_io import load_checkpoint, save_checkpoint
from .committed import find as find_checkpoint
from .committed import is_checkpoint
from .committed import numbered as committed_checkpoints
from .given_parts import given_parts
from .lora import save_lora, verify_adapters
from .manifest import FileRecord, Manifest
from .match import load_named
from .model_io import load_model, save_model
from .module_loading import load_by_modules, own_loading
from .names import full_state_dict, is_extra_state, named_objects, named_tensors
from .optimizer_io import load_optimizer, save_optimizer
from .parts import serve_parts
from .ranks import checked_by_all, loaded_by_all
from .scheduler_io import load_lr_scheduler, save_lr_scheduler
from .torch_stream import save_streamed, verify_streamed
from .unread import read_all, unread_optimizer_state, unread_state_dict

__all__ = [
    "FileRecord",
    "Manifest",
    "check_name_of_average",
    "checked_by_all",
    "committed_checkpoints",
    "find_checkpoint",
    "full_state_dict",
    "is_checkpoint",
    "is_extra_state",
    "given_parts",
    "load_checkpoint",
    "loaded_by_all",
    "load_lr_scheduler",
    "load_model",
    "load_by_modules",
    "load_named",
    "own_loading",
    "load_optimizer",
    "named_objects",
    "named_tensors",
    "read_all",
    "save_checkpoint",
    "save_lora",
    "save_lr_scheduler",
    "save_model",
    "save_optimizer",
    "save_streamed",
    "serve_parts",
    "unread_optimizer_state",
    "unread_state_dict",
    "verify_adapters",
    "verify_streamed",
]
