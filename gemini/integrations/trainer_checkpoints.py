"""Checkpoints of ``transformers.Trainer`` that are whole or not there, and whose tensors are written one at a time.

::

    output_dir/.checkpoint.saving-1f2e3d4c/checkpoint-12/    what the trainer writes, in its own layout
    output_dir/checkpoint-12/                                renamed when all of it is on the disk, manifest.json last

So that ``get_last_checkpoint`` and whatever else looks for the newest one finds a whole one, a checkpoint never lacks
a file. A plain trainer resumes from it as well.
"""

import logging
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import trainer, trainer_utils

from gemini.boosted import is_boosted
from gemini.checkpoint import (
    FileRecord,
    Manifest,
    load_lr_scheduler,
    load_model,
    load_optimizer,
    named_objects,
    save_lora,
    save_model,
    save_streamed,
    unread_optimizer_state,
)
from gemini.checkpoint.folder import bring_back, kept_aside, replace_folder, sync_file, sync_folder
from gemini.checkpoint.manifest import MANIFEST_NAME
from gemini.checkpoint.stage import Stage
from gemini.errors import CheckpointError

from .accelerator import unwrapped

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"{trainer_utils.PREFIX_CHECKPOINT_DIR}-(\d+)")
_WEIGHTS = re.compile(
    r"(adapter_)?model.*\.safetensors(\.index\.json)?|(pytorch_|adapter_)model.*\.bin(\.index\.json)?"
)
_SHARD = "5GB"


class TrainerCheckpoints:
    """The part of `GeminiTrainerMixin` that saves, finds and loads checkpoints."""

    model: Any
    optimizer: Any
    args: Any
    state: Any
    lr_scheduler: Any

    _saving_to: Path | None = None
    """The hidden folder in which a checkpoint is being written."""
    _resuming: bool = False
    """True while `train` goes on from a checkpoint."""

    # -- saving

    def _get_output_dir(self, trial: Any) -> str:
        if self._saving_to is not None:
            return str(self._saving_to)
        return super()._get_output_dir(trial=trial)  # type: ignore[misc,no-any-return]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not is_boosted(self.model) or self.args.save_on_each_node:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run = Path(self._get_output_dir(trial)).absolute()
        final = run / f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with ExitStack() as stages:
            made = (
                stages.enter_context(Stage(run, trainer_utils.PREFIX_CHECKPOINT_DIR)) if self.args.should_save else None
            )
            self._saving_to = _agreed(made.path if made is not None else None)
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                draft = self._saving_to / final.name
            finally:
                self._saving_to = None
            _barrier()  # every rank has written its random state
            if made is not None:
                self._tell_best(final, draft)
                with made.alone():
                    _commit(draft, final)
            _barrier()
        if self.args.should_save:
            trainer_utils.rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving_to is None:  # not before it has its name
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _tell_best(self, final: Path, draft: Path) -> None:
        """The trainer looked for the best checkpoint in the hidden folder."""
        if self.state.best_global_step:
            best = final.with_name(f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(draft / trainer.TRAINER_STATE_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None or not is_boosted(self.model) or not self.args.should_save:
            super()._save(output_dir, state_dict=state_dict)  # type: ignore[misc]
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir).absolute()
        is_peft = hasattr(self.model, "peft_config")
        nothing = torch.empty(0, device="cpu")
        with Stage(folder, "trainer") as stage:
            # All but the weights: configurations, tokenizers, code, arguments.
            names = named_objects(self.model) if is_peft else ()
            super()._save(str(stage.path), state_dict=dict.fromkeys(names, nothing))  # type: ignore[misc]
            files = [path.relative_to(stage.path) for path in stage.path.rglob("*") if path.is_file()]
            others = sorted(str(path) for path in files if not _WEIGHTS.fullmatch(path.name))
            for name in others:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with stage.alone():
                stage.commit(others)
        if is_peft:
            save_lora(self.model, folder, use_safetensors=True)
        else:
            save_model(self.model, folder, shard=True, size_per_shard=_SHARD)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_boosted(self.model):
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        elif self.args.should_save:
            save_streamed(unread_optimizer_state(self._unwrapped()), Path(output_dir) / trainer.OPTIMIZER_NAME)
            save_streamed(self.lr_scheduler.state_dict(), Path(output_dir) / trainer.SCHEDULER_NAME)

    # -- loading

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; a checkpoint is compared with its manifest first, and True means the newest whole one.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        found = find_checkpoint(Path(self.args.output_dir), resume_from_checkpoint)
        self._resuming = isinstance(found, str)
        try:
            return super().train(found, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._resuming = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        if hasattr(model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        elif not self._resuming:
            load_model(model, resume_from_checkpoint)
        # else: `_load_optimizer_and_scheduler` loads both, when the model has been boosted

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_boosted(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        if self._resuming and not hasattr(self.model, "peft_config"):
            load_model(self.model, checkpoint)
        optimizer, scheduler = (Path(checkpoint) / name for name in (trainer.OPTIMIZER_NAME, trainer.SCHEDULER_NAME))
        if optimizer.is_file() and scheduler.is_file():  # else only the model was saved
            load_optimizer(self._unwrapped(), optimizer)
            load_lr_scheduler(self.lr_scheduler, scheduler)

    def _load_best_model(self) -> None:
        if not is_boosted(self.model) or hasattr(self.model, "peft_config"):
            super()._load_best_model()  # type: ignore[misc]
            return
        load_model(self.model, self.state.best_model_checkpoint)

    def _unwrapped(self) -> Optimizer:
        found = unwrapped(self.optimizer)
        assert found is not None
        return found


def find_checkpoint(run: Path, asked: Any) -> Any:
    """What a trainer is to resume from: ``asked``, or, if that is True, the newest whole checkpoint of a run.

    Raises
    ------
    CheckpointError
        If it is not as it was written.
    """
    if not asked:
        return asked
    if asked is not True:
        bring_back(Path(asked))
        _check(Path(asked))
        return str(asked)
    if run.is_dir():
        for aside in run.glob(kept_aside(run / "checkpoint-*").name):
            bring_back(run / aside.name.removeprefix(".").rpartition(".")[0])
    for path in reversed(_numbered(run)):
        if (path / MANIFEST_NAME).is_file() or (path / trainer.TRAINER_STATE_NAME).is_file():
            _check(path)
            return str(path)
        logger.warning("%s is not a whole checkpoint: a save was interrupted there; resuming from the one before", path)
    return asked  # the trainer says that there is none


def _numbered(run: Path) -> list[Path]:
    """What has the name of a checkpoint, from old to new."""
    found = [(int(match[1]), path) for path in run.glob("*") if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def _check(path: Path) -> None:
    if not (path / MANIFEST_NAME).is_file():
        return  # of a plain trainer
    try:
        Manifest.read(path).check(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\nResume from an older one by its name; or, if you have changed a file on purpose, remove "
            f"{path / MANIFEST_NAME}"
        ) from error


def _commit(draft: Path, final: Path) -> None:
    """Force a finished checkpoint to the disk, write its manifest, and give it its name."""
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    records = {str(path.relative_to(draft)): FileRecord.of(path) for path in files}
    parts = {"model": ("",), "optimizer": ("",)} if trainer.OPTIMIZER_NAME in records else {"model": ("",)}
    manifest = Manifest(id=os.urandom(16).hex(), world_size=1, parts=parts, files=records)
    (draft / MANIFEST_NAME).write_text(manifest.text())
    for path in (*files, draft / MANIFEST_NAME):
        sync_file(path)
    for folder in (*(path for path in draft.rglob("*") if path.is_dir()), draft):
        sync_folder(folder)
    replace_folder(draft, final)


def _agreed(path: Path | None) -> Path:
    """The path that the first rank has chosen."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        chosen = [str(path)]
        dist.broadcast_object_list(chosen, src=0)
        return Path(chosen[0])
    assert path is not None
    return path


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
