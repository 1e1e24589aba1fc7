"""A plugin of pytest for gpu.py: failures are told as they happen, and the tests end when their time is up.

The tests come in another order, the same in every run: where there is no time for all, those that ran are a sample.
"""

from __future__ import annotations

import faulthandler
import os
import random
import time

import pytest

_END = pytest.StashKey[float]()
HANGS = 60  # seconds of one test
TERMINAL = os.dup(2)  # before pytest takes the output


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_END] = time.monotonic() + config.getoption("--seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    random.Random(0).shuffle(items)


def pytest_runtest_logstart(nodeid: str) -> None:
    faulthandler.dump_traceback_later(HANGS, exit=True, file=TERMINAL)


def pytest_runtest_logfinish(nodeid: str) -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        os.write(TERMINAL, f"\n{report.nodeid}\n{report.longreprtext[-3000:]}\n".encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None):  # type: ignore[no-untyped-def]
    result = yield
    if nextitem is not None and time.monotonic() > item.config.stash[_END]:
        item.session.shouldstop = "the time is up"
    return result
