"""``gemini-stat top``: the live screen."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gemini.arguments.command_line import option
from gemini.safe_files import USERS_FILE, replace_file
from gemini.signals import signals_to
from gemini.stat import as_json
from gemini.stat.console import INTERVAL, Exit, Usage, console, find, is_ascii, of_run, print_json, show
from gemini.stat.follow import Follower
from gemini.stat.keyboard import keyboard
from gemini.stat.screen import Shown, View, screen
from gemini.stat.sight import ALL, read
from gemini.telemetry.files import Unreadable
from gemini.telemetry.starts import ranks_of

HELP = "The live screen: tiers, one step by moment, the chunk map, moves, waits, advice."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-d", "--interval", type=option(INTERVAL), default=1.0, metavar="S", help="seconds between looks (1)"
    )
    parser.add_argument("-1", "--once", action="store_true", help="one screen, without keys")
    parser.add_argument(
        "--only", metavar="PARTS", help="some of: tiers, ranks, machine, timeline, chunks, moves, advice"
    )


def run(options: argparse.Namespace) -> Exit:
    if options.json:
        found = read(find(options), options)
        print_json(as_json.snapshot(found))
        return of_run(found.status)
    view = View(hidden=_hidden(getattr(options, "only", None)))
    follower = Follower(find(options), options)
    out = console(options)
    plain_text = is_ascii(options)
    if options.once or not (sys.stdout.isatty() and sys.stdin.isatty()):
        shown = follower.look()
        height = max(24, out.height) if sys.stdout.isatty() else 40
        show(out, screen(shown, view, out.width, height, plain_text, keys=False))
        return of_run(shown.sight.status)
    return _live(follower, view, out, plain_text, options.interval)


def _hidden(only: str | None) -> set[str]:
    from gemini.stat.screen import PARTS

    if only is None:
        return set()
    wanted = {part.strip() for part in only.split(",")}
    if unknown := wanted - set(PARTS):
        raise Usage(f"--only knows {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    return set(PARTS) - wanted


def _live(follower: Follower, view: View, out: object, plain: bool, interval: float) -> Exit:
    from rich.console import Console
    from rich.live import Live

    assert isinstance(out, Console)
    shown = follower.look()

    def draw(live: Live) -> None:
        # Asked each time: a terminal may change its size between two looks.
        live.update(screen(shown, view, out.width, out.height, plain), refresh=True)

    asked: list[BaseException] = []

    def leave(number: int, frame: FrameType | None) -> None:
        asked.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(Exit.TERMINATED))
        raise asked[-1]

    whole = Live(console=out, screen=True, auto_refresh=False, vertical_overflow="crop")
    with signals_to(leave), keyboard() as keys, whole as live:
        while True:
            if asked:  # what is raised in a destructor or a callback goes unheard
                raise asked[-1]
            draw(live)
            key = keys.wait(interval)
            if key in ("q", "Q"):
                return of_run(shown.sight.status)
            if key is not None:
                _press(key, view, follower, shown, plain)
            if not view.is_paused:
                try:
                    shown = follower.look()
                except Unreadable as error:
                    view.say(str(error))


def _press(key: str, view: View, follower: Follower, shown: Shown, plain: bool) -> None:
    if view.press(key):
        return
    if key == "r":
        follower.turn_to(_next(ranks_of(follower.path), shown))
    elif key == "s":
        view.say(_save(shown, view, plain))


def _next(ranks: Sequence[int], shown: Shown) -> str:
    """After all ranks together each by itself, and then all again."""
    now = -1 if shown.over_ranks is not None else shown.run.rank
    return str(next((rank for rank in ranks if rank > now), ALL))


def _save(shown: Shown, view: View, plain: bool) -> str:
    from rich.console import Console

    file = Path("gemini-stat.txt")
    page = Console(width=120, color_system=None, markup=False, highlight=False, emoji=False)
    with page.capture() as capture:
        page.print(screen(shown, View(hidden=view.hidden), 120, 40, plain, keys=False))
    try:
        text = "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"
        replace_file(file, text.encode(), mode=USERS_FILE)
    except OSError as error:
        return f"not saved: {error}"
    return f"saved as {file.absolute()}"
