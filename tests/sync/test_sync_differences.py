"""Updates as files have them: differences from the entries that they replace, which only the right weights decode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, masks
from shira.adapter._file import read_header, read_whole
from shira.sync import Folder, Publisher, Receiver, SyncError, Update, compose


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 32, bias=False)).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().contiguous().view(-1).view(torch.uint8)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def step(model: nn.Module, seed: int, share: float = 0.02) -> None:
    """Most entries that change go to a neighbour; some to anything, NaN and zeros of either sign among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if not tensor.is_floating_point():
                tensor += 1
                continue
            flat = tensor.view(-1)
            chosen = torch.rand(flat.numel(), generator=generator).argsort()[: max(4, int(share * flat.numel()))]
            flat[chosen] = torch.nextafter(flat[chosen], torch.tensor(torch.inf, dtype=flat.dtype))
            flat[chosen[:4]] = torch.tensor([torch.nan, -0.0, 0.0, -1e9]).to(flat.dtype)


def rounds(count: int, dtype: torch.dtype = torch.bfloat16, granule: int = 1) -> tuple[nn.Module, list[Update]]:
    """A trained model, and the updates that lead to it from `model_of`."""
    trained = model_of(dtype)
    publisher = Publisher(trained, granule=granule, exclude="num_batches" if granule > 1 else None)
    updates = []
    for seed in range(count):
        step(trained, seed)
        updates.append(publisher.publish())
    return trained, updates


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_chain_of_files(dtype: torch.dtype, granule: int, tmp_path: Path) -> None:
    trained, updates = rounds(4, dtype, granule)
    folder, exclude = Folder(tmp_path), "num_batches" if granule > 1 else None
    for update in updates:
        folder.put(update)
        assert not update.relative
    served = model_of(dtype)
    follower = Receiver(served, exclude=exclude)
    follower.stage(updates[0].to_bytes())
    follower.commit()
    # Each starts from what the one before it leads to, the first of them from the weights.
    given = folder.since(follower.version)
    assert [update.relative for update in given] == [True] * 3
    follower.stage(given[0])
    follower.stage(*given[1:])
    assert follower.staged is not None
    assert not follower.staged.relative
    follower.commit()
    wanted = state(trained) if granule == 1 else {**state(trained), "1.num_batches_tracked": bits(torch.tensor(0))}
    assert same(state(served), wanted)
    follower.rollback()
    assert follower.version == updates[0].end


@pytest.mark.parametrize("delta", [False, True])
def test_under_adapters(delta: bool) -> None:
    """What an adapter covers is not what the differences are added to."""
    trained, updates = rounds(3)
    served = model_of()
    follower, switcher = Receiver(served), Switcher(served)
    weight = served[0].weight
    indices = torch.arange(0, 96 * 64 // 4, 3, dtype=torch.int32)
    entry = Entry(indices, torch.full((4 * len(indices),), 3.0).bfloat16(), (64, 96), torch.bfloat16, 4)
    switcher.add("on", Adapter({"0.weight": entry}, delta=delta))
    switcher.activate("on")
    for update in updates:
        before = bits(weight)
        follower.stage(update.to_bytes())
        assert torch.equal(bits(weight), before)
        follower.commit()
        assert switcher.active == {"on": 1.0}
    switcher.deactivate()
    assert same(state(served), state(trained))


def test_decode_gives_the_values() -> None:
    _, (first, second) = rounds(2)
    model = model_of()
    read = Update.from_bytes(first.to_bytes())
    assert read.relative
    assert read.weights["0.weight"].values.dtype == torch.int16
    assert read.to_bytes() == first.to_bytes(), "who passes it on needs no weights"
    decoded = read.decode(model.state_dict())
    assert not decoded.relative
    assert decoded.decode({}) is decoded
    for name, entry in first.weights.items():
        assert torch.equal(decoded.weights[name].indices, entry.indices)
        assert torch.equal(bits(decoded.weights[name].values), bits(entry.values))
        if name in decoded.before:
            assert torch.equal(bits(decoded.before[name]), bits(first.before[name]))
    # Whole numbers are written as they are.
    assert read.weights["1.num_batches_tracked"].values.tolist() == [1]
    assert read.prints.keys() == first.weights.keys() - {"1.num_batches_tracked"}
    with pytest.raises(SyncError, match=r"'0\.weight' does not hold the entries that the update of step 2 starts from"):
        Update.from_bytes(second.to_bytes()).decode(model.state_dict())
    with pytest.raises(SyncError, match=r"weights must have '0\.weight', which the update changes"):
        read.decode({})
    with pytest.raises(SyncError, match=r"'0\.weight' has another shape or dtype"):
        read.decode(model_of(torch.float32).state_dict())


def test_what_needs_values_says_so() -> None:
    _, (first, second) = rounds(2)
    read = Update.from_bytes(first.to_bytes())
    for call in (
        read.adapter,
        lambda: compose(read, second),
        lambda: compose(read, Update.from_bytes(second.to_bytes())),
    ):
        with pytest.raises(
            SyncError, match=r"the update of step 1 are differences .* decode\(weights\) gives the values"
        ):
            call()


def test_back_without_weights() -> None:
    trained, updates = rounds(3)
    composed = compose(compose(*updates[:2]), updates[2])
    assert composed.before.keys() == composed.weights.keys()
    served = model_of()
    follower = Receiver(served)
    follower.stage(composed.to_bytes())
    follower.commit()
    assert same(state(served), state(trained))
    follower.stage(composed.invert().to_bytes())
    follower.commit()
    assert same(state(served), state(model_of()))
    back = Update.from_bytes(updates[0].to_bytes()).invert(model_of().state_dict())
    assert (back.start, back.end) == (updates[0].end, updates[0].start)
    assert back.before.keys() == back.weights.keys()
    # An update without what was before is written with its values, and leads to the same.
    plain = replace(composed, before={})
    assert not Update.from_bytes(plain.to_bytes()).relative
    follower.stage(plain.to_bytes())
    follower.commit()
    assert same(state(served), state(trained))


def test_weights_that_someone_wrote_to() -> None:
    """Differences are never added to other entries, whether a commit would verify or not."""
    _, (update,) = rounds(1)
    served = model_of()
    follower = Receiver(served)
    at = int(update.weights["2.weight"].indices[0])
    served[2].weight.data.view(-1)[at] += 1
    before = state(served)
    says = r"Receiver\.stage: '2\.weight' does not hold the entries that the update of step 1 starts from"
    with pytest.raises(SyncError, match=says):
        follower.stage(update.to_bytes())
    assert follower.staged is None
    assert same(state(served), before)
    follower.stage(update)  # with its values: what is wrong shows at commit
    with pytest.raises(SyncError, match="would not become what the update says"):
        follower.commit()


def test_from_a_tuner() -> None:
    model, served = model_of(torch.float32), model_of(torch.float32)
    tuner = SparseTuner(model, masks.Rand(density=0.1), targets="0")
    publisher, follower = Publisher(tuner), Receiver(served)
    with torch.no_grad():
        for values in tuner.parameters():
            values[::3] += 1e-6
    update = publisher.publish()
    assert update.before.keys() == update.weights.keys() == {"0.weight"}
    follower.stage(update.to_bytes())
    follower.commit()
    assert torch.equal(served[0].weight, model[0].weight)


def test_the_file(tmp_path: Path) -> None:
    _, (update,) = rounds(1)
    path = tmp_path / "update.safetensors"
    update.save(path)
    header = read_whole(path)
    assert header.version == 2
    assert header.weights["0.weight"].difference
    assert header.weights["0.weight"].values_dtype == "int16"
    assert not header.weights["1.num_batches_tracked"].difference
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8 : 8 + length])
    begin, end = said["0.weight.values"]["data_offsets"]
    assert 8 * (end - begin) < 4 * update.weights["0.weight"].nnz, "a few bits for each"
    damaged = bytearray(raw)
    damaged[8 + length + begin + 7] = 0xFF
    path.write_bytes(damaged)
    for read in (read_whole, Update.load):
        with pytest.raises(
            AdapterError, match=r"weight '0.weight': its values do not decode: .* modes of at most 15 low"
        ):
            read(path)
    path.write_bytes(raw.replace(b'\\"values\\":\\"difference\\"', b'\\"values\\":\\"different!\\"'))
    with pytest.raises(AdapterError, match="values must be plain or difference, got 'different!'"):
        read_header(path)
    path.write_bytes(raw.replace(b'"shira.version":"2"', b'"shira.version":"1"'))
    with pytest.raises(AdapterError, match=r"'0.weight.values' must be BF16 or F32, got U8"):
        read_header(path)


def test_versions_of_an_adapter(tmp_path: Path) -> None:
    """1 where it is about as small, 2 where that helps or is asked for; both read as the same."""

    def file(density: float, version: int | None = None) -> tuple[int, int, Adapter]:
        count = round(density * 10**6)
        indices = shira_ops.select_random(10**6, count, 3)
        adapter = Adapter({"w": Entry(indices, torch.ones(count).bfloat16(), (1000, 1000), torch.bfloat16)})
        path = tmp_path / "a.safetensors"
        adapter.save(path, version=version)
        loaded = Adapter.load(path)
        assert torch.equal(loaded.weights["w"].indices, indices)
        return read_whole(path).version, path.stat().st_size, loaded

    assert [file(density)[0] for density in (0.001, 0.01, 0.02, 0.05)] == [2, 1, 1, 2]
    for density in (0.001, 0.01, 0.05):
        (one, large, _), (two, small, _) = file(density, 1), file(density, 2)
        assert (one, two) == (1, 2)
        assert small < large
    with pytest.raises(ValueError, match=r"Adapter\.save: version must be 1, 2 or None, got 3"):
        file(0.01, 3)
