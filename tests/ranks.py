"""Run a program on several ranks of this machine: ``python ranks.py COUNT FOLDER PROGRAM [ARGUMENTS]``.

As ``torchrun`` does it, but torch is imported once, and then forked; and the ranks meet in a file of the folder. (A
TCP store's thread may outlive the rank that serves it, and abort the process.)
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from datetime import timedelta


def main() -> int:
    count, folder, program, *arguments = int(sys.argv[1]), *sys.argv[2:]
    import torch.distributed as dist

    import shira

    _ = shira.SparseTuner, shira.AdamW, shira.masks  # imported on use; here, once for all ranks
    sys.argv = [program, *arguments]
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
            store = dist.FileStore(f"{folder}/store", count)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=60))
            runpy.run_path(program, run_name="__main__")
            if dist.is_initialized():
                dist.destroy_process_group()
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main())
