"""The files of a run: training appends to them and ``gemini-stat`` reads them. Nothing here imports torch.

::

    <run folder>/run.json          static facts, written once
    <run folder>/rank00000.start.json   the process that writes the rank's records now
    <run folder>/rank00000.jsonl   one record a line, appended by one background thread
    <run folder>/rank00000.lock    locked by the training process while it lives; its mtime is the heartbeat
"""
