"""The Triton kernels without a GPU: run by Triton's interpreter on CPU tensors, and compiled ahead of time.

The interpreter replaces `triton.jit` when a module is imported, so it has a process of its own, in which
cases.BACKENDS is Triton alone. `TRITON_INTERPRET=1 pytest tests/ops/test_switch.py -k triton` runs any test like that.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import shira_ops.reference
import shira_ops.triton
from cases import Setup, build
from test_import import TESTS, python, said

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import jit  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this file starts interpreted processes", allow_module_level=True)


# Interpreted


# A part of each family's contract tests: the interpreter takes 2 ms per program.
CONTRACT = {
    "switch": "test_moves_keep_every_bit and (uint8 or bfloat16 or complex64) and (-3] or numel)"
    " or test_strengths and (bfloat16 or float64) and -3] or test_lists and 8 or test_lists_of or test_lists_may"
    " or test_shapes or test_a_view or test_switch_between or test_gather_gives or test_alpha_is"
    " or test_no_contraction or subnormals or check_indices",
    "fuse": "test_fuse[ and -3] or test_fuse_small or one_adapter and bfloat16 or never or order_of or share or keep"
    " or test_plan or the_plan_of",
    "gradient": "test_exact and (bfloat16 or float64) and (-3 or numel) or against_the or leading or span or finite"
    " or narrow",
    "optimize": "test_step and -3] or variants and (float16 or float64) or lists_of or overloads or test_dense",
    "select": "nan_comes or zero_times or in_entry or test_narrow or ignores or ties"
    " or bfloat16-magnitude-3] or float32-grad-1] or float64-snip-8]"
    " or test_random_is or test_random_of or test_random_takes or test_random_device or test_random and 65-3]",
    "codec": "test_refused or test_rice_past",
    "fingerprint": "bfloat16 or uint8 and not past or complex64 or frozen or all_granules or shape_does or parts",
    "diff": "bfloat16-16] or uint8-3] or numbers or aligned or list or follows or 15-before or 17-after or 48-"
    " or refusals or overlap",
    "overlay": "leading or 32_bits or nothing_in or not_there and -1] or once or nobody or strength and bfloat16"
    " or exact_overlays and bfloat16-3] or adapters and -65]",
    "refusals": "test_overlap or test_order or test_a_gpu or test_dtype or test_strengths or test_one_weight_twice"
    " or test_content or test_indices_alone or test_check_indices or test_decode or test_fuse_plan_arguments",
}
# Tests that call every backend themselves, and have no backend in their names.
OF_ALL = {
    "codec": "test_frozen or test_edges and 65535 or test_mode_bounds and 300 or test_largest or test_granule"
    " or test_lengths and (4097 or 8193) or test_encoders_refuse"
}


@pytest.mark.parametrize("family", CONTRACT)
def test_contract(family: str) -> None:
    chosen = f"triton and ({CONTRACT[family]})" + (f" or {OF_ALL[family]}" if family in OF_ALL else "")
    arguments = ["-q", "-x", "-k", chosen, "-p", "no:cacheprovider", "-p", "no:xdist"]
    # numpy warns of infinities and NaNs, as a GPU does not.
    arguments += ["-W", "ignore::RuntimeWarning", str(TESTS / "ops" / f"test_{family}.py")]
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    result = python(code, *arguments, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTEST_ADDOPTS="")
    assert result.returncode == 0, result.stdout[-4000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= 10


_REGISTERED = """
import torch, shira_ops
weight, values = torch.zeros(8), torch.ones(2)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
torch.ops.shira.swap_.default.redispatch(cuda, weight, torch.tensor([1, 99]), values)
print(weight.tolist(), values.tolist())
"""


def test_what_is_registered_for_cuda() -> None:
    """A kernel that never looks at the content: 99 is skipped, where any other backend refuses it."""
    wanted = "[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0] [0.0, 1.0]"
    assert said(python(_REGISTERED, TRITON_INTERPRET="1", SHIRA_BACKEND="triton")) == wanted


_LISTS = """
import torch, shira_ops, shira_ops.reference
from shira_ops.triton import find, walk
walk.MEMBERS, walk._PUT = 2, 8  # several launches, and several that fill a table
given = {}
for own in (False, True):
    weights = [torch.arange(6.0 + t) for t in range(5)]
    indices = [torch.tensor([1, 5] if t == 3 else [0, 2, 4]) for t in range(5)]
    indices[3][1] = 99 if own else 5  # out of range: kept as it is
    values, master, m, v, saved = ([10.0 * k + torch.arange(float(len(i))) for i in indices] for k in range(5))
    numbers = dict(step=2, lr=0.1, beta1=0.5, beta2=0.75, eps=1e-8, weight_decay=0.1, granule=1)
    serve = (lambda op: find(op)) if own else (lambda op: shira_ops.reference.OPS[op])
    serve("foreach_apply_")(weights, indices, values, saved, alpha=0.5, delta=False, granule=1)
    serve("foreach_adamw_")(weights, indices, master, m, v, values, **numbers)
    serve("foreach_swap_")(weights, indices, values, granule=1)
    given[own] = [weights, values, master, m, v, saved]
weights, values, master, m, v, saved = given[True]
kept = [float(one[3][1]) for one in (values, master, m, v, saved)]
for whole in given.values():
    for tensors in whole:
        tensors[3] = tensors[3][:1] if len(tensors[3]) == 2 else tensors[3][:5]
same = all(torch.equal(*pair) for one, other in zip(*given.values()) for pair in zip(one, other))
print(same, kept)
"""


def test_lists_of_several_launches() -> None:
    """The reference agrees; what belongs to an index out of range stays as it was."""
    wanted = "True [1.0, 11.0, 21.0, 31.0, 41.0]"
    assert said(python(_LISTS, TRITON_INTERPRET="1", SHIRA_BACKEND="triton")) == wanted


_BACKENDS = """
import sys, torch
torch.backends.cuda.is_built = lambda: True
if sys.argv[1:]:
    sys.modules["triton"] = None
import shira_ops
print(shira_ops.backends()["swap_"]["cuda"], {served["cuda"].name for served in shira_ops.backends().values()})
"""


def test_every_op_has_a_kernel() -> None:
    assert set(shira_ops.triton.OPS) == set(shira_ops.reference.OPS) == set(cases.OPS)


def test_backends_on_cuda() -> None:
    """What serves a GPU and why, without one: this torch is told that it has CUDA."""
    asked = said(python(_BACKENDS, SHIRA_BACKEND="triton"))
    assert asked == "Backend(name='triton', why='SHIRA_BACKEND=triton') {'triton'}"
    missing = said(python(_BACKENDS, "hidden", SHIRA_BACKEND="triton"))
    why = "SHIRA_BACKEND=triton, and triton is not installed"
    assert missing == f"Backend(name='reference', why='{why}') {{'reference'}}"
    compiled = "compiled" if torch.ops.shira._build_info() & 1 else "reference"  # never Triton's
    assert said(python(_BACKENDS, SHIRA_BACKEND="cuda")).endswith(f"{{'{compiled}'}}")
    references = said(python(_BACKENDS, SHIRA_BACKEND="reference"))
    assert references == "Backend(name='reference', why='SHIRA_BACKEND=reference') {'reference'}"


def test_import_leaves_triton_alone() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import shira_ops; print(before, 'triton' in sys.modules)"
    )
    assert said(python(code)) == "False False"


class Waits(TorchDispatchMode):
    """Notes whether a number or a size comes from the device."""

    waited = False

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waited |= op.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return op(*args, **(kwargs or {}))


def test_what_a_graph_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op waits for the device, except those that say so."""
    monkeypatch.setattr(jit.JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "empty", torch.zeros)  # sizes that a kernel would have written are read
    tolist, listed = torch.Tensor.tolist, []

    def noted(tensor: torch.Tensor) -> Any:  # which no dispatch mode sees
        listed.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    for op in cases.OPS:
        listed.clear()
        with Waits() as mode:
            shira_ops.triton.find(op)(**build(op).args)
        waited = bool(listed) if op.endswith("diff_") else mode.waited
        assert waited == (op in cases.NOT_CAPTURED), op


# Compiled ahead of time


class Driver:
    """The driver of a GPU that is not there: calls are bound, specialised and compiled, and never start."""

    def __init__(self, backend: str, arch: int | str, lanes: int) -> None:
        self.target = GPUTarget(backend, arch, lanes)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        return self.target.arch  # one cache of kernels for each

    def get_current_stream(self, device: int | str) -> int:
        return 0

    def get_device_properties(self, device: int | str) -> dict[str, int]:
        return {"max_shared_mem": 48 << 10}  # every GPU has as much

    def load_binary(self, *given: Any) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *given: None


DRIVERS = {f"sm_{arch}": Driver("cuda", arch, 32) for arch in (90, 80, 100, 120)} | {
    "gfx942": Driver("hip", "gfx942", 64)
}
COMPILED = {"float32": ["sm_100"], "bfloat16": ["sm_90", "sm_80", "gfx942"], "float64": ["sm_120"]}
SETUPS = {
    "float32": Setup(index=torch.int64),
    "bfloat16": Setup(dtype=torch.bfloat16, values=torch.float32, granule=16, index=torch.int32),
    "float64": Setup(dtype=torch.float64),
}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "apply_": [{}, {"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 0.5, "delta": True}],
    "fuse_": [{}, {"refuse": True}],
    "sgd_": [{}, {"weight_decay": 0.0, "momentum": 0.0, "momentum_buffer": None}, {"dampening": 0.0, "nesterov": True}],
}


def compiled(driver: Driver, family: str, setup: Setup) -> list[Any]:
    """Every kernel that the ops of a family start on a GPU."""

    def start() -> None:
        for op in shira_ops.triton.FAMILIES[family]:
            if op.startswith("foreach_"):
                continue
            case = build(op, setup)
            if op in ("scatter_", "swap_") and setup.values is not None:
                case.args["values"] = case.args["values"].to(setup.dtype)
            for changes in CHANGES.get(op, [{}]):
                shira_ops.triton.find(op)(**{**case.args, **changes})
            if op == "sampled_grad":  # the way of sparser masks, too
                gradient = importlib.import_module("shira_ops.triton.gradient")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(gradient, "DENSE_FROM", 2)
                    shira_ops.triton.find(op)(**case.args)

    return started(driver, start)


def started(driver: Driver, start: Callable[[], None]) -> list[Any]:
    """Every kernel that runs in `start`, compiled for a driver's GPU."""
    found: dict[int, Any] = {}
    run = jit.JITFunction.run

    def record(function: Any, *args: Any, **kwargs: Any) -> None:
        assert kwargs["enable_fp_fusion"] is False
        kernel = run(function, *args, **kwargs)
        found[id(kernel)] = kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(jit.JITFunction, "run", record)
        patch.setattr(torch, "empty", torch.zeros)  # sizes that a kernel would have written are read
        start()
    return list(found.values())


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Registers, stack and local memory (spills) of a compiled kernel."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", said)}


@pytest.mark.parametrize("dtype", SETUPS)
@pytest.mark.parametrize("family", shira_ops.triton.FAMILIES)
def test_compiles_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, dtype: str) -> None:
    """For GPUs from sm_80 to sm_120 and AMD's gfx942: no spills, no contraction, no flushed subnormals, and no products
    of 32 bits, which numbers of entries may pass."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    module = importlib.import_module(f"shira_ops.triton.{family}")
    own = {name for name, found in vars(module).items() if isinstance(found, jit.JITFunction)}
    for name in COMPILED[dtype]:
        kernels = compiled(DRIVERS[name], family, SETUPS[dtype])
        assert {one for one in own if one.endswith("_kernel")} <= {kernel.name for kernel in kernels}, name
        for kernel in kernels:
            holds(name, kernel, tmp_path)
            narrow = re.search(r"arith\.muli .* : (i32|tensor<[0-9x]*xi32>)", kernel.asm["ttir"])
            assert not narrow, f"{name}: {kernel.name}: {narrow}"


def holds(name: str, kernel: Any, path: Path) -> None:
    where = f"{name}: {kernel.name} {kernel.src.signature} {kernel.src.constants}"
    if name == "gfx942":
        assert re.search(r"\.vgpr_spill_count: +0\b", kernel.asm["amdgcn"]), where
        return
    used = resources(kernel.asm["cubin"], path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0, where
    assert used["REG"] <= 128, where
    assert ".ftz" not in kernel.asm["ptx"], where
    assert not re.search(r"\bfma\.", kernel.asm["ptx"]), where


@pytest.mark.parametrize("op", ["foreach_swap_", "foreach_sgd_"])
def test_lists_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, op: str) -> None:
    """A list is one launch, and one that fills its table."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    args = build(op, Setup(dtype=torch.float64)).args
    kernels = started(DRIVERS["sm_90"], lambda: shira_ops.triton.find(op)(**args))
    assert [kernel.name for kernel in kernels] == ["put_kernel", op.removeprefix("foreach_") + "kernel"]
    for kernel in kernels:
        holds("sm_90", kernel, tmp_path)


def entries(count: int, *dtypes: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(count, dtype=dtype) for dtype in dtypes]


def test_one_kernel_for_all_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the sizes and places of weights and masks, and the numbers of a step: compiled once. A list has one
    for each power of two that its length may not exceed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    find = shira_ops.triton.find

    def start() -> None:
        for n, limit, odd in ((1, 1, 0), (16, 64, 1), (17, 1024, 0), (4096, 70_001, 3)):
            weight = torch.zeros(limit + odd, dtype=torch.bfloat16)[odd:]
            indices = torch.arange(n, dtype=torch.int32)
            state = entries(n, *[torch.float32] * 4)
            find("swap_")(weight, indices, *entries(n, weight.dtype))
            for lr, decay in ((1e-3, 0.1), (0.0, 0.0)):
                numbers = {"lr": lr, "beta1": 0.0, "beta2": 0.9, "eps": 1e-8, "weight_decay": decay}
                find("adamw_")(weight, indices, *state, step=n, **numbers)
            for count in (3, 4):
                lists = [weight.clone() for _ in range(count)], [indices] * count
                find("foreach_swap_")(*lists, [torch.zeros(n, dtype=weight.dtype) for _ in range(count)])

    names = sorted(kernel.name for kernel in started(DRIVERS["sm_90"], start))
    assert names == ["adamw_kernel", "adamw_numbers_kernel", "put_kernel", "swap_kernel", "swap_kernel"]


@pytest.mark.parametrize("granule", [1, 4, 16])
def test_streams_move_in_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, granule: int) -> None:
    """In a whole tile all that lies in order, of single entries too: indices, a gradient, a master and two moments."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    n = 4096
    weight, indices = torch.zeros(n * granule, dtype=torch.bfloat16), torch.arange(n, dtype=torch.int32)
    state = entries(n * granule, *[torch.float32] * 4)
    numbers = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "granule": granule}
    run = shira_ops.triton.find("adamw_")
    (kernel,) = [
        one
        for one in started(DRIVERS["sm_90"], lambda: run(weight, indices, *state, **numbers))
        if one.name == "adamw_kernel"
    ]
    ptx = kernel.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) >= (5 if granule == 1 else 4)
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) >= 3
