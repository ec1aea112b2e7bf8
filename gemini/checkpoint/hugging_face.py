"""What transformers' models need besides their weights: configuration files, and other names for their tensors."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemini.boosted import boosted, is_boosted

from ..torch_private import compiled_in
from .conversion import Conversions
from .match import Source
from .names import entries, extra_states, left_out, under_plain_names


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
    original = compiled_in(model)
    config: Any = vars(original).get("config")
    if not hasattr(config, "save_pretrained"):
        return []
    config = copy.deepcopy(config)
    config.architectures = [(boosted(original).original_class if is_boosted(original) else type(original)).__name__]
    if dtype is not None:
        config.dtype = dtype
    config.save_pretrained(folder)
    generation_config: Any = vars(original).get("generation_config")
    if hasattr(generation_config, "save_pretrained") and getattr(original, "can_generate", lambda: False)():
        generation_config.save_pretrained(folder)
    return sorted(path.name for path in folder.glob("*.json"))


def resolve_names(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Give stored tensors the names, and the form, that the model has for them.

    A name that the model has is kept. Otherwise the renamings and conversions of the installed transformers are tried
    (old names of norms and submodules, experts stored one by one), and the prefix of the base model, missing in a
    checkpoint of ``GPT2Model`` that goes into ``GPT2LMHeadModel`` and too much in the other direction. Left out are
    names that the model's class lists as ignorable and buffers that are not persistent any more. Plain modules keep all
    names.
    """
    expected = {name for entry in (*entries(model), *left_out(model)) for name in entry.names} | set(
        extra_states(model)
    )
    stored = under_plain_names(stored)
    found = {name: value for name, value in stored.items() if name in expected}
    rest = {name: value for name, value in stored.items() if name not in expected}
    if not rest:
        return found
    conversions = Conversions.of(model)
    made, used = conversions.converted(model, {n: v for n, v in rest.items() if isinstance(v, Source)})
    rest = {name: value for name, value in rest.items() if name not in used} | made
    prefix = getattr(model, "base_model_prefix", "")
    dot = f"{prefix}." if isinstance(prefix, str) and prefix else ""
    ignorable = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    buffers = {name for name, _ in model.named_buffers()}
    for name, value in rest.items():
        candidates = [c for r in (conversions.rename(name), name) for c in (r, dot + r, r.removeprefix(dot))]
        known = next((candidate for candidate in candidates if candidate in expected), None)
        if known is not None:
            found.setdefault(known, value)
        elif not any(pattern.search(name) for pattern in ignorable) and buffers.isdisjoint(candidates):
            found[name] = value
    return found


def may_be_missing(model: nn.Module, name: str) -> bool:
    """True if the model's class says that a checkpoint need not have this tensor."""
    return any(re.search(p, name) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
