"""The room that gradients need when each chunk is updated within backward. Pure: no torch."""

from collections.abc import Mapping, Sequence

from ..chunk.layout import size_class


def gradient_room(stages: Sequence[frozenset[int]], nbytes: Mapping[int, int]) -> int:
    """Bytes for the gradients that wait for others of their chunk, beside those whose update is under way.

    Backward is taken to run through the modules from the last to the first. A chunk's gradients lie there from the
    last module that uses it, where tied weights count at each place, to the first one.

    ::

        modules    0   1   2   3   4   5
        chunk 0   [***]            [***]     embedding and head tied: there all along
        chunk 1       [*******]
        chunk 2               [***]          at module 3: chunk 0, 2, and chunk 1 comes while 2 is updated

    An estimate: what runs when shows only in training. Where it is too low, backward waits for updates, or takes more.

    Parameters
    ----------
    stages
        The chunks that each module uses, in the order of the modules.
    nbytes
        Of the gradients of each chunk that has any.
    """
    nbytes = {chunk: size_class(n) for chunk, n in nbytes.items()}  # as they are lent
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, chunks in enumerate(stages):
        for chunk in chunks & nbytes.keys():
            first.setdefault(chunk, i)
            last[chunk] = i
    waiting, in_update, most = 0, 0, 0
    for i in reversed(range(len(stages))):
        waiting += sum(nbytes[c] for c in stages[i] if last.get(c) == i)
        most = max(most, waiting + in_update)
        over = [nbytes[c] for c in stages[i] if first.get(c) == i]
        if over:
            waiting -= sum(over)
            in_update = sum(over)
    return min(most, sum(nbytes.values()))
