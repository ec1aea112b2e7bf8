"""The largest model, or batch, that trains under a cap: plain PyTorch's and ours, found by bisection.

Ours is told nothing but a folder for its disk tier.
"""

import time
from collections.abc import Callable

from outcome import Failure

from gemini.sizes import format_bytes, parse_bytes

from .cases import Case
from .keeper import Keeper
from .models import Size

_CASE = Case("gpt", "auto", "disk", "fp32", "lazy", 1, "auto")
_MOST = {"layers": 256, "batch": 4096}
"""Where the search ends: ours is bounded by the disk and by patience."""
_PRECISION = 0.04
"""Of the bisection: the answer may be too small by this share of it."""


class NoTimeLeft(Exception):
    """A training was not over when the search had to end: that says nothing about its memory."""


def main(what: str, cap: str, seconds: float) -> int:
    """Search for both, each for so long at most, and print them."""
    headroom = parse_bytes(cap)
    unit = "layers of 1.2 M parameters, fp32" if what == "layers" else "sequences of 128 tokens, 8 layers, fp32"
    print(f"under {format_bytes(headroom)} ({unit})", flush=True)
    largest = {}
    with Keeper() as keeper:
        for kind, name in (("plain", "plain PyTorch"), ("default", "ours")):
            end = time.monotonic() + seconds
            largest[kind], why_not_more = search(
                lambda number, kind=kind, end=end: _trains(keeper, kind, what, number, headroom, end), _MOST[what]
            )
            print(f"  {name:<14} {largest[kind]}{why_not_more and f' or more: {why_not_more}'}", flush=True)
    return 0 if largest["default"] >= largest["plain"] > 0 else 1


def search(trains: Callable[[int], bool], most: int) -> tuple[int, str]:
    """The largest number that trains, zero if one does not; and why a larger one may train, empty if none does."""
    good, bad = 0, 1
    try:
        while bad <= most and trains(bad):
            good, bad = bad, 2 * bad
        if bad > most:
            return good, "the search ends there"
        while bad - good > max(1, int(_PRECISION * good)):
            middle = (good + bad) // 2
            good, bad = (middle, bad) if trains(middle) else (good, middle)
    except NoTimeLeft as error:
        return good, str(error)
    return good, ""


def _trains(keeper: Keeper, kind: str, what: str, number: int, headroom: int, end: float) -> bool:
    left = end - time.monotonic()
    if left <= 0:
        raise NoTimeLeft(f"no time was left to try {number}")
    size = Size(layers=number) if what == "layers" else Size(rows=number)
    ended = keeper.train(_CASE, kind, headroom, size=size, seconds=left)[0]
    if isinstance(ended, str):
        if time.monotonic() >= end:
            raise NoTimeLeft(f"no time was left for {number} to end")
        return False
    if not ended.error:
        return True
    if not ended.out_of_memory:
        raise Failure(f"{kind} with {what} {number}: {ended.error}")
    return False
