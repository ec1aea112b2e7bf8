"""Join the process group that ``torchrun`` prepared, or do nothing for a single process."""

import os
import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

DEFAULT_TIMEOUT = timedelta(minutes=10)


def launch_from_torch(
    config: Mapping[str, Any] | None = None,
    *,
    backend: str | None = None,
    seed: int | None = None,
    timeout: timedelta | float | None = None,
) -> None:
    """Initialise ``torch.distributed`` from the environment that ``torchrun`` sets.

    A single process (``WORLD_SIZE`` absent or 1) needs no process group and gets none. A second call does nothing.

    Parameters
    ----------
    config
        Accepted for ColossalAI's sake, which passes ``{}``. ``backend``, ``seed`` and ``timeout`` are read from it
        where the keyword of the same name is not given; any other key is a ``ValueError``.
    backend
        ``"nccl"``, ``"gloo"``, or None for nccl where CUDA is available and gloo elsewhere.
    seed
        Seeds Python's and torch's generators. None leaves every generator alone.
    timeout
        After which a collective that waits for a lost rank fails: seconds or a ``timedelta``; None means 10 minutes.

    Raises
    ------
    ValueError
        ``WORLD_SIZE`` is above 1 and a variable that ``torchrun`` sets is missing or not a number.
    """
    options = dict(config or {})
    from_config = {name: options.pop(name, None) for name in ("backend", "seed", "timeout")}
    if options:
        raise ValueError(f"config: unknown keys {sorted(options)}; known are {sorted(from_config)}")
    backend = backend if backend is not None else from_config["backend"]
    seed = seed if seed is not None else from_config["seed"]
    timeout = timeout if timeout is not None else from_config["timeout"]
    if timeout is None:
        timeout = DEFAULT_TIMEOUT
    if not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)

    if seed is not None:
        random.seed(seed)
        torch.manual_seed(seed)

    world_size = _integer_variable("WORLD_SIZE", default=1)
    if world_size <= 1 or dist.is_initialized():
        return
    rank = _integer_variable("RANK")
    device_id = None
    if torch.accelerator.is_available() and (accelerator := torch.accelerator.current_accelerator()) is not None:
        index = _integer_variable("LOCAL_RANK") % torch.accelerator.device_count()
        device_id = torch.device(accelerator.type, index)
        torch.accelerator.set_device_index(index)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(_missing(name))
    usual = "gloo" if device_id is None else dist.Backend.default_device_backend_map.get(device_id.type, "gloo")
    backend = backend or usual
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device_id if backend == usual != "gloo" else None,
    )


def _integer_variable(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "")
    if not text:
        if default is None:
            raise ValueError(_missing(name))
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} must be a whole number, got {text!r}") from None


def _missing(name: str) -> str:
    return f"WORLD_SIZE is above 1 but {name} is not set: start the script with torchrun, or unset WORLD_SIZE"
