"""Fixtures of the contract tests. What they share otherwise stands in cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cases


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "subset: also run in a process where the references serve every op")


@pytest.fixture(params=cases.BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> cases.Backend:
    """Every way to call the ops: see cases.BACKENDS."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
