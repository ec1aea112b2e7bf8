"""Options of commands: a parser that says what is wrong in one line, and options with the rules of arguments."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from .brief import brief
from .checked import NotAllowed, Rule
from .rules import Real, Whole

USAGE = 2


class Parser(argparse.ArgumentParser):
    """Wrong usage ends with exit code 2 and one line that names the option; ``--help`` shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {one_line(message)}\n")


def one_line(message: str) -> str:
    """What is wrong, and where to look."""
    return f"{' '.join(message.split())} (--help shows all options)"


def option(rule: Rule) -> Callable[[str], Any]:
    """What reads the text of an option (argparse's ``type``)."""
    read = int if isinstance(rule, Whole) else float if isinstance(rule, Real) else str

    def meant(text: str) -> Any:
        try:
            # Python reads more numbers than people write: "1_000", " 5", digits of other scripts
            is_plain = read is str or (text.isascii() and text.strip() == text and "_" not in text)
            return rule.meant(read(text)) if is_plain else _refuse(rule, text)
        except NotAllowed as error:
            return _refuse(rule, text, error.but)
        except ValueError:
            return _refuse(rule, text)

    return meant


def _refuse(rule: Rule, text: str, but: str = "") -> NoReturn:
    raise argparse.ArgumentTypeError(f"must be {rule.allowed}, got {brief(text)}{but}")
