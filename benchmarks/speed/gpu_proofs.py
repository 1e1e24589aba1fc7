"""Runs proofs on a device one after the other, each of which may fail, hang, or take its process with it.

A program of proofs writes a line, a JSON object, for each one that ended. gpu.py starts the program again for those
after the one that ended it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.gpu import DEVICE_LOST

HANGS = (
    60  # seconds after which a proof hangs: the first one starts CUDA, and Triton's kernels are compiled on their way
)
Proof = tuple[str, Callable[[], object]]  # what it returns is told, unless it is None


def is_lost(device: str) -> bool:
    """Whether nothing works on the device any more in this process: an access outside of memory ends it for good."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def prove(description: str | None, proofs: Callable[[str, bool], Iterable[Proof]]) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--once", action="store_true", help="few and small ones: for a sanitizer")
    parser.add_argument("--lines", type=Path, help="a file that gets a line, a JSON object, for each proof")
    parser.add_argument("--first", type=int, default=0, help="the number of the first proof to run")
    arguments = parser.parse_args()
    named = list(proofs(arguments.device, arguments.once))
    failed = 0
    for number, (name, proof) in list(enumerate(named))[arguments.first :]:
        if arguments.lines:
            faulthandler.dump_traceback_later(HANGS, exit=True)
        told: dict[str, Any] = {"name": name, "number": number, "of": len(named)}
        try:
            with torch.no_grad():
                said = proof()
            if said is not None:
                told["said"] = said
                print(said)
        except Exception as error:  # all failures are reported
            failed += 1
            told |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc(limit=-4)}
            print(name, told["traceback"], sep="\n")
        faulthandler.cancel_dump_traceback_later()
        if arguments.lines:
            with arguments.lines.open("a") as lines:
                lines.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        if "error" in told and is_lost(arguments.device):
            print(f"{name}: the device is lost to this process")
            sys.exit(DEVICE_LOST)
    print(f"{len(named) - arguments.first - failed} of {len(named)} proofs hold")
    sys.exit(bool(failed))
