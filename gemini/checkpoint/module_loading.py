"""Loading module by module, where a module has a say in it: hooks on ``load_state_dict``, or overrides.

They may rename, change or add values, for which nothing can stream past them: the state dict is gathered on CPU.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from gemini.errors import CheckpointError, GeminiError

from ..boosted import boosted, is_boosted
from ..formats import listed
from ..torch_private import LOAD_LOCALLY, load_hooks, metadata_of, put_hooks_last, with_metadata
from ..units.attached import Attached
from .hugging_face import may_be_missing
from .match import Source
from .names import is_extra_state, named_objects, plain_metadata, plain_name
from .pairs import tell_loaded
from .ranks import loaded_by_all, wait_for_saves
from .safetensors_stream import VERSIONS_KEY

_LIBRARIES = ("torch", "transformers", "bitsandbytes", "gemini")
"""Whose modules load the same without their hooks: these rename what old versions saved, which a check of names finds
to be missing, or are for a layout that we know."""


def own_loading(model: nn.Module) -> str | None:
    """The first hook or override of the user's that takes part in ``load_state_dict``, in words; None if none does."""
    return next(_own_loading(model), None)


def _own_loading(model: nn.Module) -> Iterator[str]:
    if _is_users(_class_of(model).load_state_dict):
        yield f"the model ({_class_of(model).__name__}) overrides load_state_dict"
    for path, module in model.named_modules():
        named = f"{f'module {path!r}' if path else 'the model'} ({_class_of(module).__name__})"
        if _is_users(getattr(module, LOAD_LOCALLY)):
            yield f"{named} overrides {LOAD_LOCALLY}"
        if any(map(_is_users, load_hooks(module))):
            yield f"{named} has a hook on load_state_dict"


def load_by_modules(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """``load_state_dict`` of torch, with what our hooks on parts do in it. One name of a tied tensor is enough.

    Returns
    -------
    NamedTuple
        What the model's own ``load_state_dict`` returns.

    Raises
    ------
    CheckpointError
        If something does not fit, as torch says it. What comes before in the model has been loaded, as by torch.
    """
    wait_for_saves(model)
    with loaded_by_all(model, "load_state_dict"):
        tell_loaded(model, None)
        return _load(model, state_dict, strict)


def load_stored(model: nn.Module, stored: Mapping[str, Any], versions: Mapping[str, Any], *, strict: bool) -> Any:
    """`load_by_modules` for what is in files, within a change that the ranks have agreed upon.

    Parameters
    ----------
    versions
        What the files say of modules.
    """
    values = {name: value.read() if isinstance(value, Source) else value for name, value in stored.items()}
    is_lenient = not strict or bool(getattr(model, "_keys_to_ignore_on_load_missing", None))
    found = _load(model, with_metadata(values, dict(versions)) if versions else values, not is_lenient)
    if strict and found is not None:  # an override may return nothing
        missing = [name for name in found.missing_keys if not may_be_missing(model, name)]
        faults = [f"missing ({len(missing)}): {listed(missing)}"] if missing else []
        if unexpected := found.unexpected_keys:
            faults.append(f"unexpected ({len(unexpected)}): {listed(unexpected)}")
        if faults:
            raise CheckpointError(f"{'; '.join(faults)}, says load_state_dict of {_class_of(model).__name__}")
    return found


def versions_metadata(model: nn.Module) -> Mapping[str, str]:
    """What safetensors files say of modules, if one of them may look at it."""
    if own_loading(model) is None:
        return {}
    return {VERSIONS_KEY: json.dumps(plain_metadata(model))}


def _load(model: nn.Module, state_dict: Mapping[str, Any], strict: bool) -> Any:
    for module in model.modules():  # what we write is what the user's hooks have made of it
        put_hooks_last(module, Attached)
    given = _with_all_names(model, state_dict)
    try:
        return _class_of(model).load_state_dict(model, given, **({} if strict else {"strict": False}))
    except GeminiError:
        raise
    except RuntimeError as error:
        raise CheckpointError(
            f"{error}\n{own_loading(model)}: so it is loaded as torch does it, and what fits has been loaded"
        ) from error


def _with_all_names(model: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    values, metadata = dict(state_dict), metadata_of(state_dict)
    for name in named_objects(model):
        if name not in values and plain_name(name) in values:  # a compiled module has its own
            values[name] = values.pop(plain_name(name))
    of_tensor: dict[int, list[str]] = {}
    for name, value in named_objects(model).items():
        if isinstance(value, Tensor) and not is_extra_state(name):
            of_tensor.setdefault(id(value), []).append(name)
    for names in of_tensor.values():
        first = next((name for name in reversed(names) if name in values), None)
        if first is not None:
            values.update({name: values[first] for name in names if name not in values})
    if metadata is None:
        return values
    paths = {path: plain_name(f"{path}.").removesuffix(".") for path, _ in model.named_modules()}
    return with_metadata(values, {p: metadata[plain] for p, plain in paths.items() if plain in metadata} | metadata)


def _class_of(module: nn.Module) -> Any:
    """The user's."""
    return boosted(module).original_class if is_boosted(module) else type(module)


def _is_users(what: Any) -> bool:
    while isinstance(what, partial):
        what = what.func
    module = getattr(what, "__module__", None) or type(what).__module__
    return module.partition(".")[0] not in _LIBRARIES
