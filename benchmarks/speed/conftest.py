"""Options and fixtures of the speed benchmarks; the table at the end is summary.py's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import common
import summary

FOUND = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed")
    group.addoption("--quick", action="store_true", help="tiny layers and few rounds: does it run at all?")
    group.addoption("--details", action="store_true", help="print what every benchmark timed, in microseconds")
    group.addoption("--rounds", type=int, default=None, help="samples of each comparison")


def pytest_configure(config: pytest.Config) -> None:
    common.settings.quick = config.getoption("--quick")
    common.settings.rounds = config.getoption("--rounds") or (3 if common.settings.quick else 25)
    config.stash[FOUND] = []


@pytest.fixture(params=common.THREADS, ids=lambda n: f"{n}thread{'s' * (n > 1)}")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _collect(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is not None and benchmark.extra_info:
        request.config.stash[FOUND].append({"name": request.node.name, "extra_info": benchmark.extra_info})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[FOUND]
    if found:
        terminalreporter.write_line("")
        summary.show(found)
        if config.getoption("--details"):
            summary.show_seconds(found)
