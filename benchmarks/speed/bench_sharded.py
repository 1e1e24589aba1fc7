"""`Switcher.activate` on weights that 2 and 4 ranks of this machine hold together.

on      from the base to an adapter
switch  from one adapter to another
touch   for either, each rank reads and writes each cache line of its own part that the switch needs once: see
        bench_switch.py. It waits for nobody, and `activate` waits for the slowest rank, since all ranks agree that it
        went well
lists   only reading the indices and values of "on", and writing as many base's entries: what a switch moves beside the
        weights
op      `foreach_apply_` alone, on each rank's own part: what a switch of one process of that size does
agree   the agreement alone: `activate` of what is active already

Each rank holds as much as one process in the other benchmarks. With a fourth of that on each of four ranks, what does
not depend on the size (about 0.5 ms: the exchange, and Python that has left the caches) was a tenth of a touch. The
exchange comes after the writes, and nothing can hide it: only then does a rank know that its own went well.

All ranks do the same at the same time, on one thread each, so with more ranks than cores they share the cores, and
`activate` waits for ranks that have not had a turn. So the time that a rank is on a processor is noted too, which
leaves the waiting out.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.speed import common
from benchmarks.speed.bench_switch import TOUCH, machine
from benchmarks.speed.common import BF16, Report, settings, sweep

shira = pytest.importorskip("shira")
Seconds = dict[str, list[float]]


def stream(indices: list[torch.Tensor], values: list[torch.Tensor], saved: list[torch.Tensor]) -> None:
    for read, source, written in zip(indices, values, saved, strict=True):
        machine.read(common.whole_lines(read), True)
        machine.copy_(common.whole_lines(written), common.whole_lines(source), False)


def measure(rank: int, ranks: int, folder: Path, quick: bool, rounds: int) -> None:
    """What one rank does; leaves its times in the folder."""
    settings.quick = quick
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=300))
    mesh, side, mask = init_device_mesh("cpu", (ranks,)), settings.side, shira.masks.Rand(density=0.01)
    whole = torch.Size([ranks * side, side])
    model, adapters = nn.ParameterList(), {"a": {}, "b": {}}
    lines: dict[str, list[torch.Tensor]] = {"on": [], "switch": []}
    expected, lists = [], [[], [], [], []]
    for layer in range(max(2, -(-settings.working_set // (side * side * BF16.itemsize)))):
        generator = torch.Generator().manual_seed(layer * ranks + rank)
        local = torch.empty(side, side, dtype=BF16).normal_(0, 0.02, generator=generator)
        weight = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole, stride=(side, 1))
        model.append(nn.Parameter(weight))
        own = []
        for name in adapters:
            indices = mask(f"{name}.{layer}", torch.empty((), dtype=BF16).expand(whole))
            generator.manual_seed(layer)
            values = torch.empty(len(indices), dtype=BF16).normal_(0, 0.02, generator=generator)
            adapters[name][str(layer)] = shira.Entry(indices, values, tuple(whole), BF16)
            mine = (indices >= rank * local.numel()) & (indices < (rank + 1) * local.numel())
            own.append(indices[mine] - rank * local.numel())
            if name == "a":
                row = (local.clone(), own[-1], values[mine], torch.empty_like(values[mine]))
                for column, tensor in zip(lists, row, strict=True):
                    column.append(tensor)
            else:
                expected.append(local.view(-1).index_copy(0, own[-1].to(torch.int64), values[mine]))
        lines["on"].append(common.line_numbers(own[0], 1, BF16.itemsize))
        lines["switch"].append(common.line_numbers(torch.cat(own).unique(), 1, BF16.itemsize))
    switcher = shira.Switcher(model)
    for name, entries in adapters.items():
        switcher.add(name, shira.Adapter(entries), verify=False)
        switcher.activate(name)
    there = [weight.to_local().detach() for weight in model]
    assert all(torch.equal(local.view(-1), wanted) for local, wanted in zip(there, expected, strict=True))
    expected.clear()

    def nothing() -> None:
        pass

    # What comes before, untimed, and what is timed.
    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "on": (switcher.deactivate, lambda: switcher.activate("a")),
        "switch": (lambda: switcher.activate("a"), lambda: switcher.activate("b")),
        "op": (nothing, lambda: torch.ops.shira.foreach_apply_(*lists)),
        "agree": (nothing, lambda: switcher.activate(*switcher.active)),
        "lists": (nothing, lambda: stream(*lists[1:])),
    }
    for what, numbers in lines.items():
        for name, ahead in TOUCH.items():
            arguments = [(local, own, ahead) for local, own in zip(there, numbers, strict=True)]
            ways[f"{what}: {name}"] = (nothing, sweep(machine.touch_, arguments))
    seconds: Seconds = {name: [] for way in ways for name in (way, f"{way}, on a processor")}
    switches, touches = list(ways)[:5], list(ways)[5:]
    for warm in [True] * 3 + [False] * rounds:
        touches.append(touches.pop(0))
        for name in (*touches, *switches):
            before, timed = ways[name]
            before()
            common.chill()
            dist.barrier()
            start, ran = time.perf_counter(), time.process_time()
            timed()
            ran, taken = time.process_time() - ran, time.perf_counter() - start
            if not warm:
                seconds[name].append(taken)
                seconds[f"{name}, on a processor"].append(ran)
    (folder / f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def run(counts: list[int], where: str, quick: bool, rounds: int) -> None:
    """Ranks as forks of this process, which has imported everything and has no threads yet."""
    folder = Path(where)
    for count in counts:
        (folder / str(count)).mkdir()
        children = []
        for rank in range(count):
            child = os.fork()
            if not child:
                measure(rank, count, folder / str(count), quick, rounds)
                os._exit(0)
            children.append(child)
        assert not any(os.waitpid(child, 0)[1] for child in children)


def bench_sharded(benchmark: BenchmarkFixture, threads: int) -> None:
    if threads > 1:
        pytest.skip("each rank has one thread")
    counts, rounds = [2, 4], settings.few(11)
    report = Report(benchmark, threads, working_set=settings.working_set)
    with tempfile.TemporaryDirectory() as folder:
        code = f"from {__name__} import run; run({counts}, {folder!r}, {settings.quick}, {rounds})"
        benchmark.pedantic(subprocess.run, args=([sys.executable, "-c", code],), kwargs={"check": True}, rounds=1)
        for ranks in counts:
            found: list[Seconds] = [json.loads(file.read_text()) for file in Path(folder, str(ranks)).glob("*.json")]
            for name in found[0]:
                taken = [seconds for one in found for seconds in one[name]]
                report.info["seconds"][f"{ranks} ranks, {name}"] = common.spread(taken)
            for what, kind in itertools.product(("on", "switch"), ("", ", on a processor")):
                ratios, fastest = [], []
                for one in found:
                    taken, touch = one[what + kind], min((one[f"{what}: {name}{kind}"] for name in TOUCH), key=min)
                    ratios += [seconds / least for seconds, least in zip(taken, touch, strict=True)]
                    fastest.append(min(taken) / min(touch))
                report.result(f"sharded {what} in touches{kind}", f"{ranks} ranks", ratios, max(fastest))
            for kind in ("", ", on a processor"):
                pairs = [(one[f"on{kind}"], one[f"op{kind}"]) for one in found]
                ratios = [on / op for pair in pairs for on, op in zip(*pair, strict=True)]
                fastest = [min(on) / min(op) for on, op in pairs]
                report.result(f"sharded on in ops{kind}", f"{ranks} ranks", ratios, max(fastest))
            for kind in ("", ", on a processor"):
                ratios, fastest = [], []
                for one in found:
                    touch = min((one[f"on: {name}{kind}"] for name in TOUCH), key=min)
                    ratios += [1 + taken / least for taken, least in zip(one[f"lists{kind}"], touch, strict=True)]
                    fastest.append(1 + min(one[f"lists{kind}"]) / min(touch))
                report.result(f"sharded bytes in touches{kind}", f"{ranks} ranks", ratios, max(fastest))
            agree = [1e6 * seconds for one in found for seconds in one["agree"]]
            report.result("ranks agree", f"{ranks} ranks", agree, min(agree))
