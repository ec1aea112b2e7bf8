"""What Slurm's environment variables say of a task that ``srun`` started."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gemini.environment import whole_number

_FIRST_PORT = 10_000
_PORTS = 20_000
"""Below 32768, from where Linux takes the ports of outgoing connections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmTask:
    """A task among those of its job step."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    """First node of the step, which runs task 0."""
    port: int
    """The same in all tasks of the step, and another one in other jobs and steps, as a rule."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "SlurmTask":
        """The task whose environment this is.

        Raises
        ------
        ValueError
            It is not the environment of a task of ``srun``, or a variable is missing or malformed.
        """
        if not is_task(environment):
            raise ValueError(
                "this process is no task of Slurm's srun (SLURM_PROCID is not set, or it is the batch script itself): "
                "start the script with srun"
            )
        world_size = _integer(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
        job, step = _integer(environment, "SLURM_JOB_ID"), environment.get("SLURM_STEP_ID", "0")
        return cls(
            rank=_integer(environment, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_integer(environment, "SLURM_LOCALID"),
            local_world_size=_tasks_here(environment, world_size),
            host=first_host(_first_of(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")),
            port=_FIRST_PORT + (job + 997 * int(step)) % _PORTS,
        )


def is_task(environment: Mapping[str, str]) -> bool:
    """True for a task of ``srun``.

    A batch script has ``SLURM_PROCID=0`` and ``SLURM_NTASKS``, too, and would wait for tasks that nobody starts; what
    ``srun`` alone sets are the variables of the step.
    """
    is_of_step = "SLURM_STEP_NUM_TASKS" in environment or environment.get("ENVIRONMENT") != "BATCH"
    return is_of_step and "SLURM_PROCID" in environment


def first_host(nodes: str) -> str:
    """First host of a node list: ``"gpu03"`` of ``"gpu[03-05,09],login1"``.

    Parameters
    ----------
    nodes
        Names with commas between them, in which brackets hold numbers and ranges of numbers. A name may have several
        pairs of brackets.
    """
    match = re.match(r"(?:[^\[\],]|\[\d+[\d,-]*\])+(?=,|$)", nodes)
    if match is None:
        raise ValueError(f"expected a node list of Slurm such as 'gpu[03-05,09],login1', got {nodes!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def tasks_per_node(counts: str) -> Iterator[int]:
    """Tasks of each node: 2, 2, 2, 1 of ``"2(x3),1"``."""
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"expected numbers of tasks of Slurm such as '2(x3),1', got {counts!r}")
        yield from [int(match[1])] * int(match[2] or 1)


def _tasks_here(environment: Mapping[str, str], world_size: int) -> int:
    """Tasks of the step on this node; all of them where Slurm does not say."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or str(world_size)
    per_node, node = list(tasks_per_node(counts)), whole_number("SLURM_NODEID", environment=environment) or 0
    return per_node[node] if node < len(per_node) else world_size


def _first_of(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if text := environment.get(name):
            return text
    raise ValueError(f"a task of Slurm's srun has {' or '.join(names)} in its environment, and here it is not set")


def _integer(environment: Mapping[str, str], *names: str) -> int:
    text = _first_of(environment, *names)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {names[0]} must be a whole number, got {text!r}") from None
