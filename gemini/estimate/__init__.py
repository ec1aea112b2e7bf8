"""What a training will need, before anything is allocated.

::

    subject.py      what is trained: a model to build without memory, and its batches
    activations.py  non-model data: a forward and backward on fake tensors, of a few layers
    storages.py     what they take, counted; and what leaves
    demand.py       model data: the trainer's own packing and placement, for capacities that leave room for the rest
    solve.py        the largest batch, the longest sequence, the least memory that fits
    command.py      gemini-stat estimate
    explain.py      gemini-stat explain-oom
    bench.py        gemini-stat bench
"""
