"""A rank of `world.World`: joins the process group, and calls what it is told to until it is killed."""

import faulthandler
import gc
import importlib.util
import os
import pickle
import signal
import sys
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import gemini


def _import(name: str, file: str) -> None:
    """Have a module of this name, so that pickles find what is in it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _answer(name: str, file: str, pickled: bytes) -> tuple[bool, Any, str]:
    """Whether that is an error; what was returned, or the error; where it came from."""
    try:
        _import(name, file)
        function, args = pickle.loads(pickled)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return False, function(*args), ""
    except Exception as error:
        return True, f"{type(error).__name__}: {error}", traceback.format_exc()


def main() -> None:
    fileno, store, seconds = sys.argv[1:]
    faulthandler.register(signal.SIGUSR1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=float(seconds)),
    )
    torch.optim.SGD([torch.zeros(1)])  # the first optimizer has torch import as much again
    gc.collect()
    gc.freeze()  # what imports have made: the collection after each call would look at all of it
    connection = Connection(int(fileno))
    connection.send_bytes(pickle.dumps((False, None, "")))  # here we are
    while True:
        connection.send_bytes(pickle.dumps(_answer(*pickle.loads(connection.recv_bytes()))))
        gc.collect()  # a test leaves no model to the next one


if __name__ == "__main__":
    assert torch.get_num_threads() == 1, "the ranks and what they are compared with compute on one thread"
    assert gemini.__file__ is not None
    main()
