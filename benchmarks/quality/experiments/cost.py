"""What training costs: processor time of a step, memory, and the size of the file, each method in a process of its own.

The time is that of the processor (not of the clock) on one thread. The memory is what the process takes at most while
it trains, beyond what it takes with the base alone (Linux with glibc).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import tasks
from benchmarks.quality.experiments.single import rank
from benchmarks.quality.lab import Job, Lab
from benchmarks.quality.methods import Dora, Full, Lora, Method, PeftShira, Shira, ShiraDora, from_description

STEPS, SKIPPED = 8, 3  # the first steps allocate
RATE = 1e-4


def methods(family: str) -> list[Method]:
    r = rank(family)
    return [Shira(r=r, granule=16), Shira(r=r), Lora(r), PeftShira(r), Dora(r), ShiraDora(r=r), Full()]


def jobs(family: str, seeds: int) -> list[Job]:
    if family != "smollm2":
        return []
    return [Job(0.015, 1, lambda lab, one=method: cost(lab, family, one)) for method in methods(family)]  # type: ignore[misc]


def cost(lab: Lab, family: str, method: Method) -> dict[str, Any]:
    task = next(iter(tasks.tasks(family)))
    run = {"do": "cost", "task": task, "method": method.describe(), "steps": STEPS}

    def do() -> dict[str, Any]:
        # A fresh process, whose memory is not that of earlier runs.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, (task, method.describe()))

    return lab.done(run, do)


def resident(which: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or at most since `forget_peak` (``VmHWM``)."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, description: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    task, method = tasks.task(name), from_description(description)
    model, batches = task.base(), list(task.batches(0, STEPS))
    with torch.no_grad():
        task.loss(model, batches[0])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the loading has freed would hide what training takes
    before, seconds = resident("VmRSS"), []
    forget_peak()
    with method.attached(model, task, RATE, 0) as attached:
        for batch in batches:
            start = time.process_time()
            loss = task.loss(model, batch)
            attached.optimizer.zero_grad()
            loss.backward()
            attached.optimizer.step()
            seconds.append(time.process_time() - start)
        peak = resident("VmHWM") - before
        size = 2 * attached.trainable  # bfloat16
        if isinstance(method, Shira):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "adapter.safetensors"
                attached.adapter().save(path)
                size = path.stat().st_size
    return {"step": statistics.median(seconds[SKIPPED:]), "memory": peak, "file": size, "trainable": attached.trainable}
