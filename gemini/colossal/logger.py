"""`get_dist_logger`: a logger that knows ranks."""

import logging
from collections.abc import Collection, Iterable
from pathlib import Path

from .coordinator import DistCoordinator

_FORMAT = "%(name)s - %(levelname)s: %(message)s"
_OWN = "gemini"
"""The logger of this package, above those of its modules."""


class DistributedLogger:
    """One of Python's loggers, whose messages may be for some ranks only.

    Parameters
    ----------
    name
        Of the logger. It is set up (to stderr, from INFO on, not handed on to loggers above) unless it has handlers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._logger = logging.getLogger(name)
        if not self._logger.handlers:
            self._add(logging.StreamHandler())
            self._logger.propagate = False
            self._logger.setLevel(logging.INFO)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return DistCoordinator().rank

    def set_level(self, level: str) -> None:
        """Leave out what is less severe than ``"DEBUG"``, ``"INFO"``, ``"WARNING"`` or ``"ERROR"``."""
        self._logger.setLevel(_level(level))

    def log_to_file(self, path: str | Path, mode: str = "a", level: str = "INFO", suffix: str | None = None) -> None:
        """Also write messages to ``rank_<rank>.log`` (``rank_<rank>_<suffix>.log``) in a folder, made if need be.

        Parameters
        ----------
        path
            The folder.
        mode
            ``"a"`` goes on with a file that is there, ``"w"`` begins anew.
        level
            What is less severe stays out of the file.
        """
        least = _level(level)
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self.rank}.log" if suffix is None else f"rank_{self.rank}_{suffix}.log"
        handler = logging.FileHandler(folder / name, mode)
        handler.setLevel(least)
        self._add(handler)

    def debug(self, message: object, ranks: Collection[int] | None = None) -> None:
        """Log on these ranks, or on all."""
        self._log(logging.DEBUG, message, ranks)

    def info(self, message: object, ranks: Collection[int] | None = None) -> None:
        """Log on these ranks, or on all."""
        self._log(logging.INFO, message, ranks)

    def warning(self, message: object, ranks: Collection[int] | None = None) -> None:
        """Log on these ranks, or on all."""
        self._log(logging.WARNING, message, ranks)

    def error(self, message: object, ranks: Collection[int] | None = None) -> None:
        """Log on these ranks, or on all."""
        self._log(logging.ERROR, message, ranks)

    def _add(self, handler: logging.Handler) -> None:
        handler.setFormatter(logging.Formatter(_FORMAT))
        self._logger.addHandler(handler)

    def _log(self, level: int, message: object, ranks: Collection[int] | None) -> None:
        if ranks is None or self.rank in ranks:
            self._logger.log(level, message, stacklevel=3)  # the line of the script, two calls above


def get_dist_logger(name: str = _OWN) -> DistributedLogger:
    """The logger of this name, set up to be seen. That of this package also shows what ``verbose=True`` tells."""
    return DistributedLogger(name)


def disable_existing_loggers(include: Iterable[str] | None = None, exclude: Iterable[str] = (_OWN,)) -> None:
    """Leave out of loggers what is less severe than a warning.

    Parameters
    ----------
    include
        Names of the loggers. None: all that exist, except those of ``exclude``.
    exclude
        Names of loggers that stay as they are, with all below them.
    """
    if include is not None:
        names = set(include)
    else:
        kept = tuple(exclude)
        existing = list(logging.getLogger().manager.loggerDict)
        names = {name for name in existing if not any(f"{name}.".startswith(f"{above}.") for above in kept)}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)


def _level(name: str) -> int:
    levels = {"DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARNING": logging.WARNING, "ERROR": logging.ERROR}
    if name not in levels:
        raise ValueError(f"level must be one of {', '.join(map(repr, levels))}, got {name!r}")
    return levels[name]
