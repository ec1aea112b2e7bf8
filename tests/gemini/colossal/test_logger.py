"""`get_dist_logger` and `disable_existing_loggers`."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import pytest

from gemini.cluster import DistCoordinator
from gemini.logging import DistributedLogger, disable_existing_loggers, get_dist_logger


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """Loggers belong to the process; other tests look at what those of the package say."""
    names = logging.getLogger().manager.loggerDict
    before = {name: _setting(name) for name in names}
    yield
    for name in list(names):
        logger = logging.getLogger(name)
        level, propagate, handlers = before.get(name, (logging.NOTSET, True, []))
        for handler in set(logger.handlers) - set(handlers):
            if not type(handler).__module__.startswith("_pytest"):
                logger.removeHandler(handler)
                handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def _setting(name: str) -> tuple[int, bool, list[logging.Handler]]:
    logger = logging.getLogger(name)
    return logger.level, logger.propagate, list(logger.handlers)


def made() -> DistributedLogger:
    """Not a fixture: it writes to what is stderr when it is made."""
    return get_dist_logger("of_a_test")


def as_rank(rank: int) -> AbstractContextManager[object]:
    return patch.object(DistCoordinator, "rank", rank)


def test_messages_are_seen_from_info_on(capsys: pytest.CaptureFixture[str]) -> None:
    logger = made()
    logger.debug("a")
    logger.info("b")
    logger.warning("c")
    logger.error(4)
    assert capsys.readouterr().err == "of_a_test - INFO: b\nof_a_test - WARNING: c\nof_a_test - ERROR: 4\n"


def test_a_message_for_some_ranks_is_logged_on_these(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = made()
    assert logger.rank == 0
    with as_rank(1):
        logger.info("of 0", ranks=[0])
        logger.info("of 0 and 1", [0, 1])
        logger.info("of all")
    logger.info("of 1", ranks=[1])
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == ["of 0 and 1", "of all"]


def test_the_level_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    logger = made()
    logger.set_level("DEBUG")
    logger.debug("seen")
    logger.set_level("ERROR")
    logger.warning("not seen")
    assert capsys.readouterr().err == "of_a_test - DEBUG: seen\n"
    with pytest.raises(ValueError, match=r"one of 'DEBUG', .*, got 'LOUD'"):
        logger.set_level("LOUD")


def test_asking_twice_for_a_name_does_not_double_messages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made()
    get_dist_logger("of_a_test").info("once")
    assert capsys.readouterr().err == "of_a_test - INFO: once\n"


def test_a_logger_that_the_user_has_set_up_stays_so() -> None:
    users = logging.getLogger("of_a_test.users")
    users.addHandler(logging.NullHandler())
    users.setLevel(logging.ERROR)
    get_dist_logger("of_a_test.users")
    assert (len(users.handlers), users.level, users.propagate) == (1, logging.ERROR, True)


def test_records_say_which_line_of_the_script_logged() -> None:
    logger = made()
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("of_a_test").addHandler(handler)
    logger.info("here")
    assert (records[0].pathname, records[0].funcName) == (__file__, _this())


def _this() -> str:
    return test_records_say_which_line_of_the_script_logged.__name__


def test_each_rank_logs_to_a_file_of_its_own(tmp_path: Path) -> None:
    logger = made()
    folder = tmp_path / "made" / "here"
    logger.log_to_file(folder, level="WARNING")
    with as_rank(1):
        logger.log_to_file(str(folder), mode="w", suffix="run")
    logger.info("a")
    logger.error("b")
    assert (folder / "rank_0.log").read_text() == "of_a_test - ERROR: b\n"
    assert (folder / "rank_1_run.log").read_text() == "of_a_test - INFO: a\nof_a_test - ERROR: b\n"
    with pytest.raises(ValueError, match="got 'LOUD'"):
        logger.log_to_file(folder, level="LOUD")


def test_by_default_it_is_the_packages_and_shows_what_its_modules_tell(capsys: pytest.CaptureFixture[str]) -> None:
    get_dist_logger().info("a")
    logging.getLogger("gemini.booster.plugin.gemini_plugin").info("b")
    assert capsys.readouterr().err == "gemini - INFO: a\ngemini.booster.plugin.gemini_plugin - INFO: b\n"


def test_existing_loggers_are_quiet_except_the_packages_and_those_below_it() -> None:
    names = ("of_a_test.chatty", "gemini", "gemini.chunk", "geminist")
    loggers = [logging.getLogger(name) for name in names]
    for each in loggers:
        each.setLevel(logging.DEBUG)
    disable_existing_loggers()
    assert [each.level for each in loggers] == [logging.WARNING, logging.DEBUG, logging.DEBUG, logging.WARNING]


def test_the_loggers_to_quiet_or_to_keep_can_be_named() -> None:
    first, second = (logging.getLogger(f"of_a_test.{name}") for name in ("first", "second"))
    for each in (first, second):
        each.setLevel(logging.DEBUG)
    disable_existing_loggers(include=["of_a_test.first"])
    assert (first.level, second.level) == (logging.WARNING, logging.DEBUG)
    first.setLevel(logging.DEBUG)
    disable_existing_loggers(exclude=["of_a_test.first", "gemini"])
    assert (first.level, second.level) == (logging.DEBUG, logging.WARNING)
