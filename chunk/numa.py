"""Memory of several NUMA nodes for one process.

A page comes from the node of the thread that touches it first: the one that fills the homes. Where the threads of the
update run on several nodes, all of them would then wait for that node's memory, at half of the machine's bandwidth or
less. So the pages of homes alternate between the nodes that the process may run on. A process that runs on one node
(``numactl --cpunodebind``, ranks that the launcher binds) keeps the system's own choice, which is that node.
"""

import ctypes
import functools
import os
import platform
import re
from collections.abc import Callable, Collection
from pathlib import Path

NODES = Path("/sys/devices/system/node")
_MPOL_INTERLEAVE = 3
_MBIND = {"x86_64": 237, "aarch64": 235}
_MASK_BITS = 1024
"""As many nodes as the system call can be told of."""


def interleave(start: int, nbytes: int) -> None:
    """Let the pages of ``nbytes`` from the address ``start`` (a multiple of the page size) alternate between nodes.

    Only pages that have not been touched yet. A refusal changes nothing.
    """
    nodes = nodes_of_process()
    call = _mbind()
    if len(nodes) < 2 or call is None or nbytes <= 0:
        return
    call(start, nbytes, nodes)


@functools.cache
def nodes_of_process() -> frozenset[int]:
    """The nodes with memory on whose cores this process may run, as it was when first asked."""
    try:
        cores = os.sched_getaffinity(0)
    except (AttributeError, OSError):
        return frozenset()
    return nodes_of(cores, NODES)


def nodes_of(cores: Collection[int], folder: Path) -> frozenset[int]:
    """The nodes with memory that have any of ``cores``; ``folder`` is ``/sys/devices/system/node``."""
    with_memory = _numbers(folder / "has_memory")
    found = set()
    for node in folder.glob("node[0-9]*"):
        number = int(node.name[4:])
        if number in with_memory and not _numbers(node / "cpulist").isdisjoint(cores):
            found.add(number)
    return frozenset(found)


def _numbers(file: Path) -> set[int]:
    """``0-3,8`` as a set; empty if there is no such file."""
    try:
        text = file.read_text()
    except OSError:
        return set()
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {number for first, last in ranges for number in range(int(first), int(last or first) + 1)}


@functools.cache
def _mbind() -> Callable[[int, int, Collection[int]], int] | None:
    number = _MBIND.get(platform.machine())
    try:
        syscall = ctypes.CDLL(None).syscall
    except (OSError, AttributeError):
        return None
    if number is None or platform.system() != "Linux":
        return None

    def call(start: int, nbytes: int, nodes: Collection[int]) -> int:
        mask = sum(1 << node for node in nodes if node < _MASK_BITS).to_bytes(_MASK_BITS // 8, "little")
        result: int = syscall(
            ctypes.c_long(number),
            ctypes.c_void_p(start),
            ctypes.c_ulong(nbytes),
            ctypes.c_int(_MPOL_INTERLEAVE),
            ctypes.c_char_p(mask),
            ctypes.c_ulong(_MASK_BITS),
            ctypes.c_uint(0),
        )
        return result

    return call
