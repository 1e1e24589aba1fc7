"""The CUDA kernels on the CPU: in any order of their threads, over more tensors than a launch takes, on content that
was not checked. Also that the emulator itself finds a missing barrier and a wrong address."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cases
import emul
from cases import ALL, EMULATOR, Case, Setup, assert_same, build, run

ORDERS = {"forward": 0, "reverse": 1, "shuffled": 7}
SHUFFLED = 2  # the order in which every other test runs


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def order(request: pytest.FixtureRequest) -> Iterator[int]:
    emul.library()
    torch.ops.shira_emul._order(request.param)
    yield request.param
    torch.ops.shira_emul._order(SHUFFLED)


@pytest.fixture
def unwatched() -> Iterator[None]:
    """Without the search for races, which a build with SHIRA_SANITIZE=thread makes: unsorted indices may repeat."""
    emul.library()
    torch.ops.shira_emul._watch(False)
    yield
    torch.ops.shira_emul._watch(True)


def ops() -> list[str]:
    return [op for op in cases.OPS if cases.emulator_has(op)]


def test_every_op_has_a_kernel() -> None:
    assert ops() == list(cases.OPS)


# The emulator


def planted(defect: str) -> torch.Tensor:
    emul.library()
    return torch.ops.shira_emul._planted(torch.arange(600), defect)


def turned() -> torch.Tensor:
    """What the planted kernel computes: each block's 256 entries in reverse, each plus the first one of its warp."""
    entries = torch.cat([torch.arange(600), torch.zeros(168, dtype=torch.int64)]).view(3, 256).flip(1)
    return (entries + entries.view(3, 8, 32)[:, :, :1].expand(3, 8, 32).reshape(3, 256)).view(-1)[:600]


def test_the_kernel_without_a_defect(order: int) -> None:
    assert_same(planted("none"), turned())


@pytest.mark.usefixtures("unwatched")
def test_a_missing_barrier_shows() -> None:
    """It gives wrong results in at least one order of the threads."""
    emul.library()
    wrong = []
    for number in (*ORDERS.values(), SHUFFLED):
        torch.ops.shira_emul._order(number)
        wrong.append(not torch.equal(planted("barrier"), turned()))
    torch.ops.shira_emul._order(SHUFFLED)
    assert wrong[0]
    assert wrong[-1], "the order of every other test must show it too"


@pytest.mark.parametrize(
    ("defect", "says"),
    [
        ("divergence", "waits in __shfl_sync for lanes that never come|a race"),
        ("warp", "waits in __shfl_sync for lanes that never come"),
        ("mask", "with masks|for lanes that never come"),
        ("index", "writes 8 bytes outside the tensors of the call"),
        ("read only", "writes 8 bytes of a tensor that the op only reads"),
        ("alignment", "reads 8 bytes at an address that is not aligned to them"),
        ("shared", "writes past the end of a shared array of 2048 bytes"),
    ],
)
def test_a_defect_is_told(order: int, defect: str, says: str) -> None:
    with pytest.raises(RuntimeError, match=f"emulated CUDA: .*({says})"):
        planted(defect)
    assert_same(planted("none"), turned())  # and the next launch starts anew


@pytest.mark.parametrize("defect", ["barrier", "race", "blocks"])
def test_a_race_is_told(order: int, defect: str) -> None:
    """Even where no order shows it. Only a build with SHIRA_SANITIZE=thread looks for races."""
    if emul.RACES:
        who = r"thread \d+ of block \d (reads what .* writes|writes what .* (reads|writes)), and no barrier orders them"
        with pytest.raises(RuntimeError, match=f"emulated CUDA: a race: {who}"):
            planted(defect)
    elif defect != "barrier":
        assert_same(planted(defect), turned())


# The kernels


@pytest.mark.parametrize("granule", [1, 3, 8, ALL])
def test_any_order_of_threads(order: int, granule: int | str) -> None:
    """Barriers are where they must be: a block's threads and a launch's blocks may run in any order."""
    for op in ops():
        for offset, dtype in enumerate((torch.bfloat16, torch.float32)):  # the second is never aligned to 16 bytes
            if granule == ALL:
                setup = Setup(dtype=dtype, granule=2600, limit=1, count=1)
            else:
                setup = Setup(dtype=dtype, granule=granule, limit=4000 // granule, count=1400 // granule)
            case = build(op, setup)
            given = run(EMULATOR, case, offset=offset)
            if op == "sampled_grad":  # has an order of its own, but only one
                torch.ops.shira_emul._order(SHUFFLED)
                assert_same(given, run(EMULATOR, case, offset=offset))
                torch.ops.shira_emul._order(order)
            else:
                assert_same(given, run(cases.REFERENCE, case))


FOREACH = ("foreach_gather", "foreach_scatter_", "foreach_swap_", "foreach_apply_", "foreach_switch_")


@pytest.mark.parametrize("op", FOREACH)
def test_more_tensors_than_a_launch_takes(op: str) -> None:
    members = [
        build(
            op.removeprefix("foreach_"), Setup(limit=7, count=i % 5, seed=i, dtype=(torch.int8, torch.bfloat16)[i % 2])
        )
        for i in range(1000)
    ]
    case = cases.foreach(op, members)
    assert_same(run(EMULATOR, case), run(cases.REFERENCE, case))


@pytest.mark.parametrize("granule", [1, 2, 40, 1100])
@pytest.mark.parametrize("counts", [(1500, 1500), (0, 1025), (1025, 0), (1, 1500), (1500, 1), (3000, 1700)], ids=str)
def test_switch_is_cut_anywhere(counts: tuple[int, int], granule: int) -> None:
    """Equal, disjoint and partly shared masks, where a granule and its twin lie in two tiles."""
    divisor = 1 if granule < 40 else 64
    for limit in (3000 // divisor, 10_000 // divisor):
        setup = Setup(dtype=torch.bfloat16, limit=limit, granule=granule, count=counts[1] // divisor)
        case = build("switch_", setup, alpha=0.5)
        other = build("scatter_", Setup(**{**setup.__dict__, "count": counts[0] // divisor, "seed": 1}))
        case.args |= {"indices_out": other.args["indices"], "saved_out": other.args["values"]}
        assert_same(run(EMULATOR, case), run(cases.REFERENCE, case))
    if counts[0] == counts[1]:
        same = {"indices_out": case.args["indices_in"]}
        case.args |= same
        assert_same(run(EMULATOR, case), run(cases.REFERENCE, case))


def hostile(n: int, limit: int, index: torch.dtype) -> Iterator[torch.Tensor]:
    """Unchecked lists: out of range, decreasing, all the same, shuffled with wild numbers."""
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(2**31), 2**31 - 1, (n,), generator=generator)
    mixed = torch.randint(-3, limit + 3, (n,), generator=generator)
    for indices in (wild, mixed, torch.arange(n).flip(0), torch.full((n,), limit - 1), torch.full((n,), limit)):
        yield indices.to(index)


# Every op that takes indices, with what else a caller may change for it; the foreach_ forms run the same kernels.
TAKE_INDICES: dict[str, list[dict[str, Any]]] = {
    "gather": [{}],
    "scatter_": [{}],
    "swap_": [{}],
    "apply_": [{"alpha": 0.5}, {"alpha": 0.0}],
    "switch_": [{"alpha": 0.5}],
    "scatter_add_": [{"alpha": 0.5}],
    "adamw_": [{}],
    "sgd_": [{}, {"momentum_buffer": None, "momentum": 0.0, "dampening": 0.0}],
    "fingerprint_at": [{}],
}


def of_indices(case: Case) -> list[str]:
    return [name for name, _ in case.tensors() if name.startswith("indices")]


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("granule", [1, 2, 600])
@pytest.mark.parametrize("op", TAKE_INDICES)
def test_hostile_indices_reach_no_other_memory(op: str, granule: int) -> None:
    """The emulator refuses any access outside the arguments; their entries may be anything."""
    for index in cases.INDEX_DTYPES:
        for n in (5, 1025) if granule == 600 else (1025, 3000):
            setup = Setup(dtype=torch.bfloat16, limit=n + 9, count=n, granule=granule, index=index)
            for changes in TAKE_INDICES[op]:
                case = build(op, setup, **changes)
                for name in of_indices(case):
                    good = case.get(name)
                    for bad in hostile(n, n + 9, index):
                        case.set(name, bad)
                        run(EMULATOR, case)
                    case.set(name, good)


@pytest.mark.usefixtures("unwatched")
def test_hostile_indices_of_a_dense_gradient() -> None:
    """The optimizers read it at the indices."""
    for op in ("adamw_", "sgd_"):
        for bad in hostile(1025, 1034, torch.int32):
            case = build(op, Setup(dtype=torch.bfloat16, limit=1034, count=1025, index=torch.int32))
            case.args |= {"grad": torch.randn(case.args["weight"].shape), "indices": bad}
            run(EMULATOR, case)


@pytest.mark.parametrize("how", ["sampled", "dense"])
def test_hostile_indices_of_a_sampled_gradient(how: str) -> None:
    """An index out of range gives 0."""
    emul.library()
    for granule, bad in itertools.product((1, 8), hostile(300, 309, torch.int64)):
        x, y = (torch.randint(1, 4, (5, n * granule)).float() for n in (103, 3))
        y = y[:, :3].contiguous()
        given = torch.ops.shira_emul._sampled_grad(x, y, bad, granule, how).view(-1, granule)
        dense, good = (x.T @ y).view(-1, granule), (bad >= 0) & (bad < 309)
        assert_same(given, torch.where(good[:, None], dense[bad.where(good, 0)], 0.0))


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("many", [False, True], ids=("few", "many"))
def test_a_hostile_plan_reaches_no_other_memory(many: bool) -> None:
    """fuse_ with indices, offsets, sources and members that no plan has, each alone and all at once."""
    generator = torch.Generator().manual_seed(1)
    for granule, refuse in itertools.product((1, 40), (False, True)):
        case = build("fuse_", Setup(dtype=torch.bfloat16, granule=granule, limit=700, count=300), refuse=refuse)
        if many:  # more than a launch has room for
            extra = [case.args["values"][0][: granule * (i % 3)] for i in range(67)]
            case.args["values"] = [*case.args["values"], *extra]
            case.args["alphas"] = torch.linspace(-1, 1, 70)
            case.args["delta"] = [i % 2 == 0 for i in range(70)]
        adapters, n = len(case.args["values"]), case.args["sources"].numel()
        union = case.args["indices"].numel()
        wild = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
        adapter = torch.randint(-2, adapters + 2, (n,), generator=generator)
        position = torch.randint(0, 303, (n,), generator=generator)
        sources = [wild, adapter << 48 | position, torch.full((n,), 2**48 - 1), torch.full((n,), (adapters << 48) - 1)]
        members = [wild, wild.flip(0), torch.full((n,), -1), torch.full((n,), 2**63 - 1)]
        offsets = list(hostile(len(case.args["offsets"]), n, torch.int32))
        indices = list(hostile(union, 700, torch.int64))
        plans = [{"sources": one} for one in sources] + [{"offsets": one} for one in offsets]
        plans += [{"indices": one} for one in indices] + [{"members": one} for one in members]
        plans += [
            {"sources": s, "members": m, "offsets": o, "indices": i}
            for s, m, o, i in zip(sources, members, offsets, indices, strict=False)
        ]
        for plan in plans:
            run(EMULATOR, Case("fuse_", {**case.args, **plan}))


def test_what_is_out_of_range_is_left_alone() -> None:
    """Entries in range are treated as usual; for the others neither `values` nor `saved` changes."""
    limit, indices = 8, torch.tensor([-1, 0, 3, 8, 2**40])
    good = (indices >= 0) & (indices < limit)
    for op, written in (("swap_", "values"), ("apply_", "saved"), ("switch_", "saved_in")):
        case = build(op, Setup(limit=limit, count=5))
        case.args["indices_in" if op == "switch_" else "indices"] = indices
        if op == "switch_":
            case.args |= {"indices_out": indices[:0], "saved_out": case.args["saved_out"][:0]}
        given = run(EMULATOR, case)
        before = case.args["weight"].view(-1)
        wanted = case.args[written].clone()
        wanted[good] = before[indices[good]]
        assert_same(given[written], wanted)
        weight = before.clone()
        weight[indices[good]] = case.args["values"][good]
        assert_same(given["weight"].view(-1), weight)


def test_check_indices_names_the_first(order: int) -> None:
    indices = torch.arange(5000)
    indices[4321], indices[1234] = 3, 77
    says = r"got 77 after 1233 at position 1234$"
    with pytest.raises(RuntimeError, match=says):
        EMULATOR("check_indices", indices=indices, limit=9000)


def test_a_call_is_one_launch() -> None:
    """Whole models go in one: as many launches as there are kinds of entry, not as tensors."""
    launches = torch.ops.shira_emul._launches
    for op in cases.FOREACH_OPS:
        case = cases.foreach(
            op, [build(op.removeprefix("foreach_"), Setup(seed=i, dtype=torch.bfloat16)) for i in range(200)]
        )
        before = launches()
        EMULATOR(op, **case.args)
        # A rule whose numbers lie on the device is made there first; diff counts what differs, and then writes it.
        wanted = 2 if op.endswith(".tensor") else 4 if op == "foreach_diff_" else 1
        assert launches() - before == wanted, op


def test_what_a_graph_can_hold() -> None:
    """No op waits for the device or copies from the host, except those that say so."""
    for op in ops():
        case = build(op, Setup(dtype=torch.bfloat16, limit=200, count=100))
        torch.ops.shira_emul._capturing(True)
        try:
            if op in cases.NOT_CAPTURED:
                with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                    EMULATOR(op, **case.args)
            else:
                EMULATOR(op, **case.args)
        finally:
            torch.ops.shira_emul._capturing(False)
        EMULATOR(op, **case.args)  # the error was of that call alone


@pytest.mark.parametrize("adapters", [64, 65, 200, 1500])
def test_any_number_of_adapters(adapters: int) -> None:
    """More than a launch has room for are put into a table on the device, which a captured graph holds too."""
    emul.library()
    generator = torch.Generator().manual_seed(adapters)
    masks = [(torch.rand(60, generator=generator) < 0.2).nonzero().view(-1).int() for _ in range(adapters)]
    indices, offsets, sources, members = cases.ORACLE("fuse_plan", indices=masks, granule=1)
    args = {
        "weight": torch.randn(60, generator=generator).bfloat16(),
        "saved": torch.zeros(len(indices), dtype=torch.bfloat16),
        "indices": indices,
        "offsets": offsets,
        "sources": sources,
        "members": members,
        "values": [torch.randn(len(one), generator=generator) for one in masks],
        "alphas": torch.randn(adapters, generator=generator),
        "delta": [i % 3 == 0 for i in range(adapters)],
        "refuse": False,
        "granule": 1,
    }
    wanted = run(cases.ORACLE, Case("fuse_", args))
    torch.ops.shira_emul._capturing(True)
    try:
        assert_same(run(EMULATOR, Case("fuse_", args)), wanted)
    finally:
        torch.ops.shira_emul._capturing(False)


def test_select_top_of_more_tiles_than_a_scan_takes_at_once() -> None:
    """Past 2^21 granules a block counts several tiles, and their counts are scanned in several steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2**21 + 5000, generator=generator).bfloat16()
    k = 20_000
    given = EMULATOR("select_top", weight=weight, grad=None, k=k, score="magnitude", granule=1)
    order = weight.abs().float().sort(descending=True, stable=True).indices
    assert_same(given, order[:k].sort().values.int())


def top_of(weight: torch.Tensor, grad: torch.Tensor | None, k: int, score: str) -> torch.Tensor:
    scores = (weight if grad is None else grad).float().abs().nan_to_num(nan=-1.0, posinf=torch.inf)
    return scores.sort(descending=True, stable=True).indices[:k].sort().values.int()


@pytest.mark.parametrize("shared", [0, 99 << 10], ids=["of an H100", "of an RTX 5090"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_select_top_of_16_bits_counts_them_once(order: int, dtype: torch.dtype, shared: int) -> None:
    """All 15 bits at a time, in counters of 32 or of 16 bits; any bits, any alignment, and more equal ones in a block
    than 16 bits can count."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    shuffled = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    equal = torch.cat([every, every.new_full((3 * 65_536 + 5,), 0x3C01)])
    torch.ops.shira_emul._most_shared(shared)
    try:
        for bits, k, score in (
            (shuffled, 70, "magnitude"),
            (shuffled[3:], 30_000, "grad"),
            (shuffled[5 : 5 + 2**15], 2**15 - 10, "magnitude"),  # the cut lies among NaNs
            (equal[1:], 150_000, "magnitude"),
            (every[7:9], 1, "grad"),
        ):
            entries = bits.view(dtype)
            grad = entries if score == "grad" else None
            weight = torch.zeros_like(entries) if score == "grad" else entries
            before = torch.ops.shira_emul._launches()
            given = EMULATOR("select_top", weight=weight, grad=grad, k=k, score=score, granule=1)
            assert torch.ops.shira_emul._launches() - before == 3  # count, pick, write
            assert_same(given, top_of(weight, grad, k, score))
    finally:
        torch.ops.shira_emul._most_shared(0)


def test_shared_memory_that_a_device_lacks() -> None:
    emul.library()
    torch.ops.shira_emul._most_shared(48 << 10)
    try:
        with pytest.raises(RuntimeError, match="emulated CUDA: a launch with 65536 bytes of shared memory"):
            EMULATOR("select_top", weight=torch.ones(9).half(), grad=None, k=1, score="magnitude", granule=1)
    finally:
        torch.ops.shira_emul._most_shared(0)


@pytest.mark.parametrize("score", ["magnitude", "grad", "snip"])
@pytest.mark.parametrize("offset", [0, 1])
def test_select_top_of_long_granules(order: int, score: str, offset: int) -> None:
    """By 16 bytes and by single entries: of one team of warps and of several, and cut at any entry."""
    for dtype, values in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        for granule, limit in ((16, 70), (40, 33), (43, 3), (264, 31), (1032, 2)):
            setup = Setup(dtype=dtype, values=values, granule=granule, limit=limit, count=limit // 2)
            case = build("select_top", setup, score=score)
            assert_same(run(EMULATOR, case, offset=offset), run(cases.REFERENCE, case))
