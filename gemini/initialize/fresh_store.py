"""A part of the ranks' common store that holds nothing of an earlier start.

torchrun keeps its store when it starts the ranks again after a failure. Gloo would find there the addresses of
processes that have ended, and fail or hang. ``TORCHELASTIC_RESTART_COUNT`` does not tell the starts apart: the agent of
each machine counts the failures of its own ranks, so that after one failure on one of two machines its ranks have 1 and
those of the other 0 (torch 2.13). Therefore rank 0 draws a name for the start, and each rank makes sure that it has the
name of the rank 0 that runs now::

    rank 0                                      another rank
    "start" = a name that it has drawn   -->    reads the name
    reads the token                     <--     "name/rank" = a token that it has drawn
    "name/token" = ""                    -->    waits for that; reads the name again meanwhile

A name of an earlier start is answered by nobody.
"""

import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store

_SHORTEST_PAUSE_SECONDS = 0.01
_LONGEST_PAUSE_SECONDS = 0.5


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of ``store`` to which only the processes of this start write.

    Parameters
    ----------
    store
        Reached by all ranks; may hold anything.
    timeout
        How long to wait for the other ranks.

    Raises
    ------
    torch.distributed.DistStoreError
        Ranks did not arrive in time; the message names them.
    """
    store = PrefixStore("gemini_memory", store)
    deadline = time.monotonic() + timeout.total_seconds()
    name = _call_together(store, world_size, deadline) if rank == 0 else _join(store, rank, deadline)
    return PrefixStore(name, store)


def _call_together(store: Store, world_size: int, deadline: float) -> str:
    name = uuid4().hex
    store.set("start", name)
    arrivals = [f"{name}/{rank}" for rank in range(1, world_size)]
    try:
        store.wait(arrivals, timedelta(seconds=max(0.001, deadline - time.monotonic())))
    except DistStoreError:
        missing = [rank for rank, arrival in enumerate(arrivals, 1) if not store.check([arrival])]
        raise DistStoreError(f"ranks {missing} did not arrive") from None
    for arrival in arrivals:
        store.set(f"{name}/{store.get(arrival).decode()}", "")
    return name


def _join(store: Store, rank: int, deadline: float) -> str:
    token, name, pause = uuid4().hex, "", _SHORTEST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        if store.check(["start"]) and (current := store.get("start").decode()) != name:
            name = current
            store.set(f"{name}/{rank}", token)
        if name and store.check([f"{name}/{token}"]):
            return name
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
    raise DistStoreError("rank 0 did not answer")
