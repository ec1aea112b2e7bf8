"""`launch_from_torch`, `launch_from_slurm` and `launch`: one process group for all ranks."""

import logging
import os
import random
import sys
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, and missing in the stubs
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from gemini.cores import usable_cores
from gemini.environment import whole_number
from gemini.errors import LaunchError
from gemini.process_wide import at_exit, set_variables

from .fresh_store import fresh_store
from .slurm import SlurmTask, is_task

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=10)


def launch_from_torch(
    config: Mapping[str, Any] | str | None = None,
    *,
    backend: str | None = None,
    seed: int | None = None,
    timeout: timedelta | float | None = None,
    verbose: bool = False,
) -> None:
    """Initialise ``torch.distributed`` with whatever started this process.

    In this order:

    1. A process group that exists already (Ray Train makes one, or an earlier call did) stays as it is.
    2. torchrun's variables (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``).
    3. The variables of a task of Slurm's ``srun``; see `launch_from_slurm`.
    4. Without any of them this is a single process. It needs no process group and gets none.

    One rank under torchrun or srun gets a group of one.

    Parameters
    ----------
    config
        Accepted for ColossalAI's sake: ``{}``, or the backend in its newer versions. ``backend``, ``seed`` and
        ``timeout`` are read from it where the keyword of the same name is not given; any other key is a ``ValueError``.
    backend
        ``"nccl"``, ``"gloo"``, or None for nccl where CUDA is available and gloo elsewhere.
    seed
        Seeds Python's, numpy's and torch's generators. None leaves every generator alone.
    timeout
        How long the start and each collective wait for a rank: seconds or a ``timedelta``; None means 10 minutes.
    verbose
        Log on rank 0 how many ranks there are.

    Raises
    ------
    ValueError
        A variable is missing or not a number.
    LaunchError
        Other ranks did not arrive within the timeout.
    """
    options: dict[str, Any] = {"backend": config} if isinstance(config, str) else dict(config or {})
    from_config = {name: options.pop(name, None) for name in ("backend", "seed", "timeout")}
    if options:
        raise ValueError(f"config: unknown keys {sorted(options)}; known are {sorted(from_config)}")
    backend = backend if backend is not None else from_config["backend"]
    seed = seed if seed is not None else from_config["seed"]
    timeout = timeout if timeout is not None else from_config["timeout"]

    if dist.is_initialized():
        _seed(seed)
    elif os.environ.get("RANK") and os.environ.get("WORLD_SIZE"):
        rank, world_size = _integer_variable("RANK"), _integer_variable("WORLD_SIZE")
        host, port = _address() if world_size > 1 else ("", 0)
        launch(rank, world_size, host, port, backend, None, seed, verbose, timeout=timeout)
    elif is_task(os.environ):
        launch_from_slurm(backend=backend, seed=seed, verbose=verbose, timeout=timeout)
    elif _integer_variable("WORLD_SIZE", 1) > 1:
        raise ValueError(_missing("RANK"))
    else:
        _seed(seed)


def launch_from_slurm(
    host: str | None = None,
    port: int | None = None,
    backend: str | None = None,
    seed: int | None = None,
    verbose: bool = False,
    *,
    timeout: timedelta | float | None = None,
) -> None:
    """Initialise ``torch.distributed`` in a task that ``srun`` started.

    torchrun's variables are set from Slurm's, for libraries that read them.

    Parameters
    ----------
    host, port
        Where rank 0 listens. By default ``MASTER_ADDR`` and ``MASTER_PORT`` where they are set, else the first node of
        the step and a port that follows from the numbers of job and step.
    backend, seed, verbose, timeout
        As for `launch_from_torch`.

    Raises
    ------
    ValueError
        This process is no task of ``srun``, for example the batch script itself.
    LaunchError
        Other ranks did not arrive within the timeout.
    """
    task = SlurmTask.of(os.environ)
    host = host or os.environ.get("MASTER_ADDR") or task.host
    port = port or _integer_variable("MASTER_PORT", task.port)
    set_variables(
        RANK=task.rank,
        WORLD_SIZE=task.world_size,
        LOCAL_RANK=task.local_rank,
        LOCAL_WORLD_SIZE=task.local_world_size,
        MASTER_ADDR=host,
        MASTER_PORT=port,
    )
    launch(task.rank, task.world_size, host, port, backend, task.local_rank, seed, verbose, timeout=timeout)


def launch(
    rank: int,
    world_size: int,
    host: str,
    port: int,
    backend: str | None = None,
    local_rank: int | None = None,
    seed: int | None = None,
    verbose: bool = False,
    *,
    timeout: timedelta | float | None = None,
) -> None:
    """Initialise ``torch.distributed`` with ranks and addresses that the caller knows.

    Does nothing if there is a process group of this size in which this process has this rank.

    Parameters
    ----------
    rank, world_size
        Number of this process, from 0, and number of all processes.
    host, port
        Where rank 0 listens. A group of one needs neither.
    local_rank
        Number of this process on its machine, which picks its accelerator; None: ``LOCAL_RANK`` where it is set, else
        ``rank`` modulo the number of accelerators.
    backend, seed, verbose, timeout
        As for `launch_from_torch`.

    Raises
    ------
    ValueError
        There is a process group of another size or with another rank, or ``rank`` is not below ``world_size``.
    LaunchError
        Other ranks did not arrive within the timeout.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to {world_size - 1} where world_size is {world_size}, got {rank}")
    _seed(seed)
    if dist.is_initialized():
        if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
            raise ValueError(
                f"rank {rank} of {world_size} was asked for, but the process group that exists already has this "
                f"process as rank {dist.get_rank()} of {dist.get_world_size()}; call dist.destroy_process_group() first"
            )
        return
    timeout = timeout if timeout is not None else DEFAULT_TIMEOUT
    timeout = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    device = _take_accelerator(local_rank if local_rank is not None else _integer_variable("LOCAL_RANK", rank))
    usual = "gloo" if device is None else dist.Backend.default_device_backend_map.get(device.type, "gloo")
    backend = backend or usual
    dist.init_process_group(
        backend,
        store=_store(rank, world_size, host, port, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if backend == usual != "gloo" else None,
    )
    at_exit(_leave)
    if rank == 0:
        _hint_at_idle_cores(device)
        if verbose:
            logger.info("%d ranks over %s", world_size, backend)


def _store(rank: int, world_size: int, host: str, port: int, timeout: timedelta) -> Store:
    if world_size == 1:
        return HashStore()  # nobody else has to find it, and no port can be taken
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        store, _, _ = next(rendezvous(f"tcp://{address}", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        return fresh_store(store, rank, world_size, timeout)
    except dist.DistError as error:
        raise LaunchError(
            f"rank {rank} of {world_size} did not meet the others at {address} within {timeout.total_seconds():g} s: "
            f"{str(error).splitlines()[0]}; look for the first error of the other ranks, and see that MASTER_ADDR and "
            "MASTER_PORT name a free port of the machine of rank 0 that all machines can reach"
        ) from error


def _leave() -> None:
    """End Gloo's threads before the interpreter ends. One exit in some dozens is an abort otherwise (torch 2.13).

    A rank that has failed does not wait for operations under way, and NCCL's groups must be left by all ranks together.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo" and not hasattr(sys, "last_type"):
        dist.destroy_process_group()


def _take_accelerator(local_rank: int) -> torch.device | None:
    """The accelerator of this rank, made the current one; None if there is none."""
    if not torch.accelerator.is_available() or (accelerator := torch.accelerator.current_accelerator()) is None:
        return None
    index = local_rank % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def _seed(seed: int | None) -> None:
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


def _hint_at_idle_cores(device: torch.device | None) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for several ranks on a machine where the user has set nothing."""
    is_by_torchrun = bool(os.environ.get("TORCHELASTIC_RUN_ID")) and _integer_variable("LOCAL_WORLD_SIZE", 1) > 1
    cores = usable_cores()
    if device is None and is_by_torchrun and os.environ.get("OMP_NUM_THREADS") == "1" and cores > 1:
        warnings.warn(
            f"each rank computes with one thread (OMP_NUM_THREADS=1, which torchrun sets) and has {cores} cores to "
            f"itself; start with OMP_NUM_THREADS={cores} torchrun ...",
            stacklevel=3,
        )


def _address() -> tuple[str, int]:
    if not (host := os.environ.get("MASTER_ADDR")):
        raise ValueError(_missing("MASTER_ADDR"))
    return host, _integer_variable("MASTER_PORT")


def _integer_variable(name: str, default: int | None = None) -> int:
    number = whole_number(name, default)
    if number is None:
        raise ValueError(_missing(name))
    return number


def _missing(name: str) -> str:
    return f"WORLD_SIZE is above 1 but {name} is not set: start the script with torchrun, or unset WORLD_SIZE"
