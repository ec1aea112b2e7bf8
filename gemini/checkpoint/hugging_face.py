"""What transformers' models need besides their weights: configuration files, and other names for their tensors."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.module import original_class

from .names import entries


def save_configuration(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Write ``config.json`` and ``generation_config.json`` for ``from_pretrained``.

    Parameters
    ----------
    dtype
        Of the saved weights: ``from_pretrained`` builds the model in it.

    Returns
    -------
    list of str
        The files written; none for a model that is not transformers' own.
    """
    # Of the model itself: a wrapper (peft) shows the configuration of the model in it, whose names are others.
    config: Any = vars(model).get("config")
    if not hasattr(config, "save_pretrained"):
        return []
    config = copy.deepcopy(config)
    config.architectures = [original_class(model).__name__]
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    generation_config: Any = vars(model).get("generation_config")
    if hasattr(generation_config, "save_pretrained") and getattr(model, "can_generate", lambda: False)():
        generation_config.save_pretrained(folder)
    return sorted(path.name for path in folder.glob("*.json"))


def resolve_names(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Give stored tensors the names that the model has for them.

    A name that the model has is kept. Otherwise the renamings of the installed transformers are tried (old names of
    norms and submodules), and the prefix of the base model, missing in a checkpoint of ``GPT2Model`` that goes into
    ``GPT2LMHeadModel`` and too much in the other direction. Names that the model's class lists as ignorable are left
    out. Plain modules keep all names.
    """
    expected = {name for entry in entries(model) for name in entry.names}
    prefix = getattr(model, "base_model_prefix", "")
    dot = f"{prefix}." if isinstance(prefix, str) and prefix else ""
    ignorable = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    renamings = _renamings(model) if any(name not in expected for name in stored) else []
    found: dict[str, Any] = {name: value for name, value in stored.items() if name in expected}
    for name, value in stored.items():
        if name in expected:
            continue
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        candidates = [c for r in (renamed, name) for c in (r, dot + r, r.removeprefix(dot)) if c in expected]
        if candidates:
            found.setdefault(candidates[0], value)
        elif not any(pattern.search(name) for pattern in ignorable):
            found[name] = value
    return found


def may_be_missing(model: nn.Module, name: str) -> bool:
    """True if the model's class says that a checkpoint need not have this tensor."""
    return any(re.search(p, name) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def _renamings(model: nn.Module) -> list[Any]:
    """Those of transformers for this model; none where they cannot be had."""
    if not hasattr(model, "base_model_prefix"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    except (ImportError, AttributeError, TypeError):  # before transformers 5, or not transformers' model
        return []
