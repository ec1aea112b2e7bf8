"""Every part of every small tensor's memory, in whatever order of dimensions, is a few boxes that are that part."""

from itertools import permutations, product
from math import prod

import pytest

from gemini.checkpoint.dcp.boxes import boxes

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 4), (1, 3, 1, 2), (2, 1, 3), (2, 2, 2, 2), (0, 3)]


def strides_of(shape: tuple[int, ...], order: tuple[int, ...]) -> list[int]:
    strides, numel = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim], numel = numel, numel * shape[dim]
    return strides


@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_of_the_memory_is_its_boxes_one_after_the_other(shape: tuple[int, ...]) -> None:
    for order in permutations(range(len(shape))):
        strides = strides_of(shape, order)
        for start in range(prod(shape) + 1):
            for stop in range(start, prod(shape) + 1):
                found = boxes(shape, strides, range(start, stop))
                assert len(found) <= max(1, 2 * len(shape) - 1)
                memory = []
                for box in found:
                    assert box.start == start + len(memory)
                    inside = product(*(range(box.sizes[dim]) for dim in box.order))
                    for index in inside:
                        place = dict(zip(box.order, index, strict=True))
                        memory.append(sum((box.offsets[d] + place[d]) * strides[d] for d in range(len(shape))))
                assert memory == list(range(start, stop))
