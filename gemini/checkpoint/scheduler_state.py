"""Whether a saved state is one of a learning rate scheduler: by the names and the kinds of values of its state now.

``load_state_dict`` of torch writes whatever it is given into the scheduler's attributes, methods included.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemini.nn.optimizer.rules.option_ranges import brief, number_of

from ..formats import shown

_COUNTS = ("last_epoch", "_step_count")
_OF_TORCH = (*_COUNTS, "base_lrs", "_last_lr")
"""These are of the kinds that torch gives them in the states of all schedulers."""
_OF_GROUPS = ("base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")
"""These have a value for each parameter group."""
_WORST = ("best", "mode_worse")
"""Infinite before the first measurement."""
_OF_SOME_TORCH = ("verbose", "_is_initial", "_get_lr_called_within_step", "_step_count", "_scale_fn_custom")
"""What the state has with some versions of torch and not with others."""
_INNER = "_schedulers"
"""The states of schedulers that a scheduler leads."""
_LIMIT = 2**53


def state_faults(scheduler: Any, saved: Any) -> Iterator[str]:
    """What is wrong with a saved state, in words; nothing if it can be loaded.

    Parameters
    ----------
    scheduler
        What is to take the state over. What a class that is not torch's adds to the state is for that class to know.
    saved
        Anything that was in a file.
    """
    own = scheduler.state_dict()
    if not isinstance(saved, dict) or not all(isinstance(name, str) for name in saved):
        yield f"it is {brief(saved)}, expected names and values"
        return
    is_torchs = type(scheduler).__module__.startswith(("torch.", "gemini."))
    for name in own:
        if name not in saved and name not in _OF_SOME_TORCH and (is_torchs or name in _COUNTS):
            yield f"{name} is missing"
    for name, value in dict.items(saved):
        if name == _INNER and name in own:
            yield from _inner_faults(scheduler, own[name], value)
        elif name in own:
            if (is_torchs or name in _OF_TORCH) and (fault := _fault(name, own[name], value)):
                yield f"{name} {fault}"
        elif hasattr(scheduler, name) or (is_torchs and name not in _OF_SOME_TORCH):
            yield f"{shown(name)} is no part of the state of {type(scheduler).__name__}"


def _inner_faults(scheduler: Any, own: Sequence[Any], saved: Any) -> Iterator[str]:
    if not isinstance(saved, list) or len(saved) != len(own):
        yield f"{_INNER} must be {len(own)} states, got {brief(saved)}"
        return
    for place, (inner, state) in enumerate(zip(getattr(scheduler, _INNER), saved, strict=True)):
        yield from (f"of scheduler {place}, {fault}" for fault in state_faults(inner, state))


def _fault(name: str, own: Any, value: Any) -> str | None:
    """What is wrong with a value, given the one of now."""
    if own is None:
        return None
    if isinstance(own, bool | str):
        is_kind = isinstance(value, type(own))
        return None if is_kind else f"must be {'text' if isinstance(own, str) else 'True or False'}, got {brief(value)}"
    if name in _COUNTS:
        is_count = type(value) is int and -1 <= value < _LIMIT
        return None if is_count else f"must be a whole number from -1, got {brief(value)}"
    if number_of(own) is not None:
        return _number_fault(name, own, value)
    if isinstance(own, list | tuple):
        return _list_fault(name, own, value)
    if isinstance(own, Mapping):
        return _mapping_fault(name, own, value)
    return None if isinstance(value, type(own)) else f"must be a {type(own).__name__}, got {brief(value)}"


def _number_fault(name: str, own: Any, value: Any) -> str | None:
    number = number_of(value)
    if number is None:
        return f"must be a number, got {brief(value)}"
    may_be_infinite = name in _WORST or math.isinf(float(own))
    if math.isnan(number) or (math.isinf(number) and not may_be_infinite):
        return f"must be finite, got {number}"
    return f"must be at least 0, got {number:g}" if name == "base_lrs" and number < 0 else None


def _list_fault(name: str, own: Sequence[Any], value: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return f"must be a list, got {brief(value)}"
    if name in _OF_GROUPS and len(value) != len(own):
        return f"must have a value for each of {len(own)} parameter groups, got {brief(value)}"
    if not own:
        return None
    pairs = zip(own, value, strict=True) if len(own) == len(value) else ((own[0], item) for item in value)
    return next((fault for mine, theirs in pairs if (fault := _fault(name, mine, theirs))), None)


def _mapping_fault(name: str, own: Mapping[Any, Any], value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"must be names and values, got {brief(value)}"
    if all(isinstance(key, int) for key in own):  # how often each milestone is given
        keys_and_values = [part for item in dict.items(value) for part in item]
        is_kind = all(type(part) is int and part >= 0 for part in keys_and_values)
        return None if is_kind or not own else f"must be whole numbers, got {brief(value)}"
    faults = (_fault(f"{name}.{key}", own[key], item) for key, item in dict.items(value) if key in own)
    return next((fault for fault in faults if fault), None)
