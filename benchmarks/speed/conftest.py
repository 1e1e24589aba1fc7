"""Options and fixtures of the speed benchmarks. summary.py makes the table at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.speed import common, heap, summary

FOUND = pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("speed")
    group.addoption(
        "--quick", action="store_true", help="tiny layers and few rounds, only to see whether everything runs"
    )
    group.addoption("--details", action="store_true", help="print what every benchmark timed, in microseconds")
    group.addoption("--full", action="store_true", help="all cases and numbers of threads, not only the selection")
    group.addoption("--rounds", type=int, default=None, help="number of samples of each comparison")


def pytest_configure(config: pytest.Config) -> None:
    common.settings.quick = config.getoption("--quick")
    common.settings.full = config.getoption("--full")
    common.settings.samples = config.getoption("--rounds")
    config.addinivalue_line("markers", "full: a case that is measured only with --full")
    config.addinivalue_line("markers", "every_thread_count: on every number of threads, also without --full")
    config.stash[FOUND] = []
    heap.keep()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --full, selects cases that together take about ten minutes."""
    if config.getoption("--full"):
        return

    def chosen(item: pytest.Item) -> bool:
        threads = item.callspec.params.get("threads", 1) if hasattr(item, "callspec") else 1
        one = threads == 1 or item.get_closest_marker("every_thread_count") is not None
        return one and item.get_closest_marker("full") is None

    left_out = [item for item in items if not chosen(item)]
    items[:] = [item for item in items if chosen(item)]
    config.hook.pytest_deselected(items=left_out)


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    machine_info["torch"] = torch.__version__.partition("+")[0]


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
