"""Lazily initialised models whose weights are bit-identical to eager initialisation.

::

    with LazyInitContext():          # allocates nothing: every aten op is recorded on a tape
        model = GPT2LMHeadModel(config)
    materialize(model, sink)         # replays the tape, one tensor at a time

How the files build on each other (imports go down only)::

    context.py       what a user enters
    interception.py  safe_open and torch.load, as long as a context is open
    torch_files.py   tensors of torch's files that are read at replay
    weight_files.py  tensors of safetensors files that are read at replay
    materialize.py   module -> targets -> replay -> the same objects, now real
    sharding.py      this rank's part of each parameter, as a DTensor
    record.py        one aten call -> meta result + one record
    tensor.py        LazyTensor, the object a user holds
    replay.py        runs a plan and hands finished storages over
    liveness.py      which records matter for which storages (pure)
    tape.py          records, values, storages (pure data)
    session.py       the tape on which a thread records
    skip.py          past random numbers that are not needed
    rng.py           where the random numbers of a record come from
"""

from .context import LazyInitContext
from .materialize import materialize, seeds
from .tensor import is_lazy

__all__ = ["LazyInitContext", "is_lazy", "materialize", "seeds"]
