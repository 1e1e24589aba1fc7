"""Any valid call: the bits of the reference, whatever the dtypes, granules, sizes, strengths and places in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import cases
from cases import Backend, Case, Setup, assert_same, build, run

# Around the sizes of groups, blocks and tiles of every backend.
COUNTS = [0, 1, 2, 7, 31, 33, 63, 64, 65, 127, 129, 255, 256, 257, 511, 513, 1023, 1024, 1025, 1026, 2047, 2049]
GRANULES = [*range(1, 10), 15, 16, 17, 31, 32, 33, 48, 63, 64]
MOST = 3000  # entries of a call
# What rounds to 0 or 1, underflows, overflows, and is none of it.
ALPHAS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.3,
    1e-46,
    1e-45,
    1 + 2**-25,
    1 - 2**-25,
    3e38,
    1e39,
    1e308,
    float("inf"),
    float("nan"),
]
MOVES = ("gather", "scatter_", "swap_", "apply_", "switch_", "diff_", "fingerprint", "fingerprint_at")
TAKE_FLOAT32 = ("apply_", "switch_", "scatter_add_", "fuse_", "adamw_", "sgd_", "select_top", "sparse_linear")
INTEGERS = ("sparse_linear", "sparse_linear_add_")  # whose sums are exact, in any order
OPS = [op for op in cases.OPS if op != "sampled_grad"]


def single(op: str) -> str:
    return op.removeprefix("foreach_").partition(".")[0]


@st.composite
def changes(draw: Any, op: str, setup: Setup) -> dict[str, Any]:
    number = st.sampled_from(ALPHAS)
    if op in ("apply_", "switch_") and setup.dtype in cases.FLOAT_DTYPES:
        return {"alpha": draw(number), "delta": draw(st.booleans())}
    if op == "scatter_add_":
        return {"alpha": draw(number)}
    if op == "fuse_":
        wide = torch.float64 if setup.dtype == torch.float64 else torch.float32
        alphas = torch.tensor(draw(st.lists(number, min_size=3, max_size=3)), dtype=torch.float64).to(wide)
        return {
            "alphas": alphas,
            "delta": draw(st.lists(st.booleans(), min_size=3, max_size=3)),
            "refuse": draw(st.booleans()),
        }
    if op == "select_top":
        return draw(st.sampled_from([{"score": "snip"}, {"score": "grad"}, {"score": "magnitude", "grad": None}]))
    if op == "sgd_":
        return draw(st.sampled_from([{}, {"weight_decay": 0.0}, {"dampening": 0.0, "nesterov": True}]))
    if op == "encode_indices":
        return {"version": draw(st.sampled_from([1, 2]))}
    return {"before": draw(st.booleans())} if op == "diff_" else {}


@st.composite
def calls(draw: Any) -> Case:
    name = draw(st.sampled_from(OPS))
    op = single(name)
    dtype = draw(st.sampled_from(cases.MOVE_DTYPES if op in MOVES else cases.FLOAT_DTYPES))
    granule = draw(st.sampled_from(GRANULES))
    count = min(draw(st.sampled_from(COUNTS)), MOST // granule)
    number = dtype in cases.FLOAT_DTYPES
    setup = Setup(
        dtype=dtype,
        granule=granule,
        count=count,
        limit=max(1, count + draw(st.sampled_from([0, 1, 2, count, 2 * count + 1]))),
        index=draw(st.sampled_from(cases.INDEX_DTYPES)),
        values=torch.float32 if number and op in TAKE_FLOAT32 and draw(st.booleans()) else None,
        seed=draw(st.integers(0, 2**31)),
        specials=number and op not in INTEGERS and draw(st.booleans()),
    )
    assume(dtype != torch.bool or op != "diff_")  # the snapshot is made by other bits than 0 and 1
    return build(name, setup, **draw(changes(op, setup)))


@pytest.mark.parametrize(
    "backend", [one for one in cases.BACKENDS if one is not cases.REFERENCE], ids=lambda one: one.name
)
@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(call=calls(), offset=st.integers(0, 3))
def test_any_call(backend: Backend, call: Case, offset: int) -> None:
    assert_same(run(backend, call, offset=offset), run(cases.REFERENCE, call))
