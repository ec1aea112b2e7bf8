"""A plugin of pytest for the children of `own_process`: runs the tests that it is told to, and sends their reports."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from own_process import PIPES

_pipes = zip(os.environ[PIPES].split(","), "rw", strict=True)
_requests, _reports = (os.fdopen(int(pipe), mode) for pipe, mode in _pipes)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    items = {item.nodeid: item for item in session.items}
    # Which test comes next is not known; all but what the session has is torn down.
    unknown: Any = SimpleNamespace(listchain=lambda: [session])
    for line in _requests:
        item = items[line.rstrip("\n")]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=unknown)
        print(file=_reports, flush=True)
    return True


class _Teller:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        print(json.dumps(data, default=str), file=_reports, flush=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Teller(config))
