"""The same bits for any number of threads, and calls from several Python threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import cases
from cases import OPS, Backend, Case, Setup, assert_same, build, map_tensors

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(params=[b for b in cases.BACKENDS if b.device == "cpu"], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    """What runs on torch's own thread pool."""
    return request.param


def large(op: str, granule: int) -> Case:
    """Past the grain of a parallel loop, in sizes that no number of threads divides evenly."""
    if op == "sampled_grad":
        rng = np.random.default_rng(0)
        grad_output, input = (cases.random_numbers(rng, 257 * n, torch.float32).view(257, n) for n in (96, 128))
        indices = cases.random_indices(rng, 96 * 128 // granule, 5003 // granule, torch.int64)
        return Case(op, {"grad_output": grad_output, "input": input, "indices": indices, "granule": granule})
    limit, count = 150_001 // granule, 50_003 // granule
    return build(op, Setup(dtype=torch.bfloat16, granule=granule, limit=limit, count=count, index=torch.int32))


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_number_of_threads(backend: Backend, op: str, granule: int) -> None:
    case = large(op, granule)
    wanted = None
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        given = cases.run(backend, case)
        if wanted is None:
            wanted = given
        assert_same(given, wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(50_003, 20_001), (20_001, 50_003), (60_000, 60_000), (3, 50_003)], ids=str)
def test_switch_of_lists_of_several_lengths(backend: Backend, counts: tuple[int, int], threads: int) -> None:
    """The two walks are cut at the same granules, however long each is."""
    torch.set_num_threads(threads)
    for granule in (1, 2):
        case = build("switch_", Setup(limit=60_000, count=counts[0], granule=granule), alpha=0.5)
        out = build("scatter_", Setup(limit=60_000, count=counts[1], granule=granule, seed=1))
        case.args |= {"indices_out": out.args["indices"], "saved_out": out.args["values"]}
        assert_same(cases.run(backend, case), cases.run(cases.ORACLE, case))


@pytest.mark.parametrize("threads", [1, 2])
def test_first_offence_is_named_by_any_number_of_threads(backend: Backend, threads: int) -> None:
    torch.set_num_threads(threads)
    indices = torch.arange(200_003)
    indices[150_000] = 7
    indices[60_001] = 60_000
    says = r"indices must be strictly increasing in \[0, 300000\), got 60000 after 60000 at position 60001$"
    with pytest.raises(RuntimeError, match=says):
        backend("check_indices", indices=indices, limit=300_000)


def test_python_threads_at_once(backend: Backend) -> None:
    """Each with tensors of its own: swapped back and forth, all are what they were."""
    torch.set_num_threads(2)
    members = [build("swap_", Setup(limit=40_000 + i, count=20_000, seed=i)).clone() for i in range(4)]
    before = [map_tensors(torch.clone, case.args) for case in members]

    def back_and_forth(case: Case) -> None:
        for _ in range(10):
            backend("swap_", **case.args)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(back_and_forth, members))
    assert_same([case.args for case in members], before)


def test_more_threads_than_a_token_has_rows_for() -> None:
    """33 rows for 32 threads: of two each, 17 threads have some."""
    rows, columns = 33, 16_384
    numbers = torch.randn(rows * columns, generator=torch.Generator().manual_seed(0))
    indices = torch.arange(rows * columns, dtype=torch.int32)
    found = []
    for threads in (32, 1):
        torch.set_num_threads(threads)
        found.append(torch.ops.shira.sparse_linear(numbers[:columns][None], indices, numbers, rows))
    assert_same(found[0], found[1])


@pytest.mark.parametrize("entries", [20_000, 100_000])
@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_select_top_while_another_thread_writes(entries: int, score: str) -> None:
    """The selection is of granules that there are, or refused: nothing is written outside of it."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(entries, generator=generator)
    contents = [torch.zeros(entries), 4 * weight.flip(0), torch.ones(entries), weight.clone()]
    stop, refusals = threading.Event(), set()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                weight.copy_(content)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(100):
                try:
                    found = torch.ops.shira.select_top(weight, weight, entries // 3, score=score)
                except RuntimeError as error:
                    refusals.add(str(error))
                else:
                    torch.ops.shira.check_indices(found, entries)
        finally:
            stop.set()
        writing.result()
    assert refusals <= {"select_top: weight and grad must not be written to while they are read"}
