"""What a run tells about itself: files that training appends to and ``gemini-stat`` reads. Nothing here needs torch.

::

    <run folder>/run.json          static facts, written once
    <run folder>/rank00000.jsonl   one record a line, appended by one background thread
    <run folder>/rank00000.lock    locked by the training process while it lives; its mtime is the heartbeat
"""
