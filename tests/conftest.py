"""Fixtures of the contract tests. What else they share is in cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases


def pytest_configure(config: pytest.Config) -> None:
    # The cases are small, and workers of xdist that each bring a pool of threads only wait for one another. Tests of
    # what threads share ask for them: the fixture `threads`.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "subset: also run in a process where the references serve every op")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert left, "the test left grad mode off: other tests would fail"


@pytest.fixture(params=cases.BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> cases.Backend:
    """Every way to call the ops: see cases.BACKENDS."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, or as many as the test sets."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
