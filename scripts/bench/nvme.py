"""DeepSpeed's settings for a disk, and the search for its best ones on this machine."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

CHOICES: dict[str, tuple[Any, ...]] = {
    "parameters": ("cpu", "nvme"),
    "sub_group_size": (10_000_000, 40_000_000, 100_000_000),
    "pipeline": (True, False),
    "block_size": (1 << 20, 1 << 22, 1 << 24),
    "queue_depth": (8, 32),
    "intra_op_parallelism": (1, 2, 4),
    "overlap_events": (True, False),
    "single_submit": (False, True),
}
"""By importance, as they are searched."""
BEST: dict[str, Any] = {
    "parameters": "cpu", "sub_group_size": 40_000_000, "pipeline": True, "block_size": 1 << 20, "queue_depth": 8,
    "intra_op_parallelism": 1, "overlap_events": True, "single_submit": False,
}  # fmt: skip
LARGEST_PARAMETER = 40_000_000
"""Elements that a buffer must hold: the embedding of GPT2 at a width of 768."""


_BUFFERS = 4
"""Masters, two moments and the gradient of a group of parameters; pipelined, of three groups at a time."""


def zero_options(setting: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `Zero3` takes for a setting."""
    folder_of = {"nvme_path": str(folder)}
    on_cpu, on_disk = {"device": "cpu"}, {"device": "nvme", **folder_of}
    pipelined = {"pipeline_read": setting["pipeline"], "pipeline_write": setting["pipeline"]}
    buffers = {"buffer_size": LARGEST_PARAMETER, "buffer_count": 5}
    return {
        "zero": {
            "sub_group_size": setting["sub_group_size"],
            "offload_optimizer": {**on_disk, **pipelined, "buffer_count": _BUFFERS * (3 if setting["pipeline"] else 1)},
            "offload_param": on_cpu if setting["parameters"] == "cpu" else {**on_disk, **buffers},
        },
        "aio": {
            name: setting[name]
            for name in ("block_size", "queue_depth", "intra_op_parallelism", "overlap_events", "single_submit")
        },
    }


def best_setting(
    begin: Mapping[str, Any], seconds_of: Callable[[Mapping[str, Any]], float], choices: Mapping[str, Any] = CHOICES
) -> dict[str, Any]:
    """The fastest setting found by changing one thing after the other.

    Parameters
    ----------
    begin
        The first one.
    seconds_of
        Measures one; may raise for those that do not run.
    """
    best, seconds = dict(begin), seconds_of(begin)
    print(f"{seconds:6.2f} s  {best}", flush=True)
    for name, values in choices.items():
        for value in values:
            if value == best[name]:
                continue
            other = {**best, name: value}
            try:
                taken = seconds_of(other)
            except Exception as error:
                print(f"  fails  {name} {value}: {str(error)[-200:]}", flush=True)
                continue
            print(f"{taken:6.2f} s  {name} {value}", flush=True)
            if taken < seconds:
                best, seconds = other, taken
    return best
