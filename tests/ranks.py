"""Run programs on several ranks of this machine, each in its own folder:
``ranks.py COUNT FOLDER [--import MODULE,...] PROGRAM ...``.

As ``torchrun`` does it, but torch (and what ``--import`` names) is imported once, and then forked; and the ranks meet
in a file of the folder. (A TCP store's thread may outlive the rank that serves it, and abort the process.)
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from datetime import timedelta
from pathlib import Path

IMPORTED = (
    "pytest", "shira.train.optim", "shira.train.tuner", "torch.distributed.checkpoint.state_dict",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel",
)  # fmt: skip


def run(rank: int, count: int, folder: Path, program: Path) -> None:
    import torch.distributed as dist

    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    store = dist.FileStore("store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
    sys.argv = [str(program)]
    runpy.run_path(str(program), run_name="__main__")
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> int:
    count, folder, rest = int(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3:]
    more = rest.pop(1).split(",") if rest[0] == "--import" else []
    programs = [Path(p).resolve() for p in rest if p != "--import"]
    for module in (*IMPORTED, *more):
        importlib.import_module(module)
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            for program in programs:
                run(rank, count, folder / program.stem, program)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
