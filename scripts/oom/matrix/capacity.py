"""The largest model, or batch, that trains under a cap: plain PyTorch's and ours, found by bisection.

Ours is told nothing but a folder for its disk tier.
"""

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


def main(what: str, cap: str) -> int:
    """Search for both and print them."""
    headroom = parse_bytes(cap)
    largest = {}
    with Keeper() as keeper:
        for kind in ("plain", "default"):
            largest[kind] = search(lambda number, kind=kind: _trains(keeper, kind, what, number, headroom), _MOST[what])
    unit = "layers of 1.2 M parameters, fp32" if what == "layers" else "sequences of 128 tokens, 8 layers, fp32"
    print(f"under {format_bytes(headroom)} ({unit})")
    for kind, name in (("plain", "plain PyTorch"), ("default", "ours")):
        number, is_bounded = largest[kind]
        print(f"  {name:<14} {number}{'' if is_bounded else ' or more: the search ends there'}")
    return 0 if largest["default"][0] >= largest["plain"][0] > 0 else 1


def search(trains: Callable[[int], bool], most: int) -> tuple[int, bool]:
    """The largest number that trains, and whether a larger one was seen to fail. Zero if one does not train."""
    good, bad = 0, 1
    while bad <= most and trains(bad):
        good, bad = bad, 2 * bad
    if bad > most:
        return good, False
    while bad - good > max(1, int(_PRECISION * good)):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if trains(middle) else (good, middle)
    return good, True


def _trains(keeper: Keeper, kind: str, what: str, number: int, headroom: int) -> bool:
    size = Size(layers=number) if what == "layers" else Size(rows=number)
    ended = keeper.train(_CASE, kind, headroom, size=size)[0]
    if isinstance(ended, str) or not ended.error:
        return not isinstance(ended, str)
    if not ended.out_of_memory:
        raise Failure(f"{kind} with {what} {number}: {ended.error}")
    return False
