"""Tests in processes of their own, each reported as if it had run here.

A test that is marked ``own_process`` (with the environment variables that it needs) runs in a child, which is a pytest
that gets the names of tests one by one. Tests with the same environment share a child, so that its imports are paid
once. A child that dies or takes too long fails the test that it was at; the next test gets a new one. With
``GEMINI_MEMORY_IN_PROCESS=1`` they run in the process of the caller, for a debugger.

::

    this process --name of a test--> child
                 <--its reports-----
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

PIPES = "GEMINI_MEMORY_TEST_PIPES"
IN_PROCESS = "GEMINI_MEMORY_IN_PROCESS"
GRACE_SECONDS = 30.0
"""Longer than a test may take: its own pytest ends one that is too slow. Then one that cannot be ended is."""
LOG_BYTES = 8000

_Environment = frozenset[tuple[str, str]]
_children = pytest.StashKey[dict[_Environment, "_Child"]]()
_seconds = pytest.StashKey[float]()


class _Died(Exception):
    """The child ended, or was ended, with a test under way."""


class _Child:
    """A pytest that runs the tests it is told to."""

    def __init__(self, root: Path, files: list[str], environment: _Environment) -> None:
        self._log = TemporaryFile()
        its_requests, self._requests = os.pipe()
        self._reports, its_reports = os.pipe()
        self._left_over = b""
        plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "own_process_loop")
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "pytest", *plugins, "-q", *files],
            cwd=root,
            env={**os.environ, **dict(environment), PIPES: f"{its_requests},{its_reports}"},
            pass_fds=(its_requests, its_reports),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(its_requests)
        os.close(its_reports)

    def run(self, name: str, seconds: float) -> Iterator[Any]:
        """The reports of a test, as JSON has them."""
        try:
            os.write(self._requests, f"{name}\n".encode())
        except BrokenPipeError:
            raise _Died(self._last_words("it ended before the test")) from None
        deadline = time.monotonic() + seconds
        while (line := self._line(deadline)) != b"":
            yield json.loads(line)

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._left_over:
            ready, _, _ = select.select([self._reports], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _Died(self._last_words("it took too long"))
            part = os.read(self._reports, 1 << 16)
            if not part:
                raise _Died(self._last_words("it ended in the test"))
            self._left_over += part
        line, _, self._left_over = self._left_over.partition(b"\n")
        return line

    def _last_words(self, what: str) -> str:
        self._process.kill()
        self.end()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")[-LOG_BYTES:]
        self.close_log()
        return f"the process of this test is gone: {what} (status {self._process.returncode})\n{log}"

    def end(self) -> None:
        os.close(self._requests)  # it reads that, and goes
        os.close(self._reports)
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close_log(self) -> None:
        self._log.close()


def _environment(item: pytest.Item) -> _Environment | None:
    mark = item.get_closest_marker("own_process")
    if mark is None or PIPES in os.environ or IN_PROCESS in os.environ:
        return None
    return frozenset(mark.kwargs.items())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test elsewhere is stopped elsewhere."""
    for item in items:
        if _environment(item) is not None:
            mark = item.get_closest_marker("timeout")
            item.stash[_seconds] = float(mark.args[0] if mark is not None else config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(0), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    environment = _environment(item)
    if environment is None:
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, environment):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # A test before this one left its module set up, as this one is of it, too; nobody else knows when it is the last.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def _reports(item: pytest.Item, environment: _Environment) -> Iterator[pytest.TestReport]:
    children = item.config.stash.setdefault(_children, {})
    if environment not in children:
        files = {str(other.path) for other in item.session.items if _environment(other) == environment}
        children[environment] = _Child(item.config.rootpath, sorted(files), environment)
    try:
        for data in children[environment].run(item.nodeid, item.stash[_seconds] + GRACE_SECONDS):
            if isinstance(data["longrepr"], list):  # why it was skipped: JSON has no tuples
                data["longrepr"] = tuple(data["longrepr"])
            yield item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
    except _Died as error:
        del children[environment]
        keywords: Mapping[str, Any] = {item.name: 1}
        yield pytest.TestReport(item.nodeid, item.location, keywords, "failed", str(error), "call")


def pytest_unconfigure(config: pytest.Config) -> None:
    for child in config.stash.get(_children, {}).values():
        child.end()
        child.close_log()
