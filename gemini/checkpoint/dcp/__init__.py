"""Checkpoints of `torch.distributed.checkpoint`: each rank writes and reads what it has at home. Nothing is gathered.

::

    save_load.py                             what a user calls: staged, committed, checked
    save_planner.py  load_planner.py         planners for torch.distributed.checkpoint
    weights_load.py  optimizer_load.py       what is stored for a model and for an optimizer, compared with what is here
    reads.py  pieces.py  stored.py           boxes on their way; what is here; what is there
    storage.py  metadata.py  objects.py      files
    boxes.py                                 a part of memory as boxes of a tensor
"""

from .load_planner import LoadPlanner
from .metadata import is_checkpoint
from .save_load import checked, load, save, write_into
from .save_planner import SavePlanner

__all__ = ["LoadPlanner", "SavePlanner", "checked", "is_checkpoint", "load", "save", "write_into"]
