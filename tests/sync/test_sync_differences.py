"""Updates as files have them: differences from the entries that they replace, which only the right weights decode."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, _granules, masks
from shira.adapter import _file
from shira.adapter._file import Packed, opened_adapter, read_whole
from shira.sync import Folder, Publisher, Receiver, SyncError, Update, compose
from states import bits, same, state


def model_of(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.BatchNorm1d(64), nn.Linear(64, 32, bias=False)).to(dtype)


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
    says = r"the update of step 1 are differences .* decode\(weights\) gives the values"
    with pytest.raises(SyncError, match=says):
        read.adapter()
    with pytest.raises(SyncError, match=says):
        read.to_bytes(differences=False)
    for one, other in ((first, Update.from_bytes(second.to_bytes())), (read, second)):
        says = r"has the values of '0\.weight' and not the entries before, and the other one has differences"
        with pytest.raises(SyncError, match=says):
            compose(replace(one, before={}), replace(other, before={}))


def composed(updates: list[Update], read: set[int]) -> Update:
    """All of them as one, some of them as they come from files."""
    given = [Update.from_bytes(one.to_bytes()) if at in read else one for at, one in enumerate(updates)]
    found = given[0]
    for update in given[1:]:
        found = compose(found, update)
    return found


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_differences_add_up(dtype: torch.dtype, granule: int) -> None:
    trained, updates = rounds(3, dtype, granule)
    exclude = "num_batches" if granule > 1 else None
    for read in ({0, 1, 2}, {0}, {1}, {0, 2}):
        sum_of = composed(updates, read)
        assert sum_of.relative
        assert (sum_of.start, sum_of.end, sum_of.step) == (updates[0].start, updates[-1].end, 3)
        decoded = sum_of.decode(model_of(dtype).state_dict())
        assert not decoded.relative
        served = model_of(dtype)
        follower = Receiver(served, exclude=exclude)
        for given in (sum_of, sum_of.to_bytes(), decoded):
            follower.stage(given)
            follower.commit()
            assert same(state(served), state(trained) | ({} if exclude is None else untracked(served)))
            follower.rollback()
            assert same(state(served), state(model_of(dtype)))


def untracked(model: nn.Module) -> dict[str, Tensor]:
    """What is left out where granules are large."""
    return {name: tensor for name, tensor in state(model).items() if "num_batches" in name}


def test_a_sum_of_differences_under_adapters_and_after_others() -> None:
    """Its print is not known, so the whole base is compared: what an adapter covers is not what it is added to."""
    trained, updates = rounds(4)
    served = model_of()
    follower, switcher = Receiver(served), Switcher(served)
    indices = torch.arange(0, 96 * 64 // 4, 3, dtype=torch.int32)
    entry = Entry(indices, torch.full((4 * len(indices),), 3.0).bfloat16(), (64, 96), torch.bfloat16, 4)
    switcher.add("on", Adapter({"0.weight": entry}))
    switcher.activate("on")
    follower.stage(updates[0].to_bytes())  # staged, not written: the sum starts from what that leads to
    follower.stage(composed(updates[1:3], {0, 1}).to_bytes())
    follower.commit()
    follower.stage(composed(updates[3:], {0}))
    follower.commit()
    assert switcher.active == {"on": 1.0}
    switcher.deactivate()
    assert same(state(served), state(trained))


def test_a_sum_of_differences_is_added_to_its_own_weights_alone() -> None:
    _, updates = rounds(2)
    sum_of = composed(updates, {0, 1})
    assert sum_of.prints["0.weight"] is None
    served = model_of()
    follower = Receiver(served)
    untouched = set(range(96 * 64)) - set(sum_of.weights["0.weight"].indices.tolist())
    served[0].weight.data.view(-1)[min(untouched)] += 1
    before = state(served)
    says = r"'0\.weight' is not what the update of step 2 starts from, so its differences cannot be added"
    with pytest.raises(SyncError, match=rf"Receiver\.stage: {says}"):
        follower.stage(sum_of)
    with pytest.raises(SyncError, match=rf"Update\.decode: {says}"):
        sum_of.decode(served.state_dict())
    assert follower.staged is None
    assert same(state(served), before)


def test_the_print_of_a_sum_is_known_where_the_second_writes_every_entry() -> None:
    trained = nn.Linear(8, 8, bias=False)
    served = nn.Linear(8, 8, bias=False)
    served.load_state_dict(trained.state_dict())
    publisher = Publisher(trained)
    updates = []
    for rows in (2, 4):
        with torch.no_grad():
            trained.weight[:rows] += 1
        updates.append(publisher.publish())
    for read in ({0, 1}, {0}):
        sum_of = composed(updates, read)
        assert sum_of.prints == {"weight": _granules.fingerprint(updates[1].weights["weight"].values)}
        assert torch.equal(sum_of.decode(served.state_dict()).weights["weight"].values, trained.weight[:4].view(-1))


def test_differences_lead_back_without_weights() -> None:
    trained, served = (nn.Linear(16, 16).to(torch.bfloat16) for _ in range(2))
    served.load_state_dict(trained.state_dict())
    first, follower, publisher = state(served), Receiver(served), Publisher(trained)
    updates = []
    for seed in range(2):
        step(trained, seed, share=0.3)
        updates.append(Update.from_bytes(publisher.publish().to_bytes()))
    sum_of = compose(*updates)
    back = sum_of.invert()
    assert back.relative
    assert (back.start, back.end) == (sum_of.end, sum_of.start)
    for one, wanted in ((sum_of, state(trained)), (back.to_bytes(), first), (sum_of.to_bytes(), state(trained))):
        follower.stage(one)
        follower.commit()
        assert same(state(served), wanted)
    nowhere = compose(updates[1], updates[1].invert())
    assert nowhere.start == nowhere.end == updates[1].start
    assert not any(entry.values.any() for entry in nowhere.weights.values())
    # Whole numbers have no differences, so what was before them must be known.
    _, (counted,) = rounds(1)
    with pytest.raises(SyncError, match=r"weights must have '1\.num_batches_tracked', which the update changes"):
        Update.from_bytes(counted.to_bytes()).invert()


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


def parts_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the rest."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def file_of(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_tensor(raw: bytes, name: str, change: Callable[[bytes], bytes] | None) -> bytes:
    """The file with another content of a tensor, or without it."""
    header, data = parts_of(raw)
    found, at = {"__metadata__": header.pop("__metadata__")}, 0
    content = b""
    for one, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = said["data_offsets"]
        piece = data[begin:end]
        if one == name:
            if change is None:
                continue
            piece = change(piece)
            said = {**said, "shape": [len(piece) // {"U8": 1, "I64": 8}[said["dtype"]]]}
        found[one] = {**said, "data_offsets": [at, at + len(piece)]}
        content += piece
        at += len(piece)
    return file_of(found, content)


def test_the_file(tmp_path: Path) -> None:
    _, (update,) = rounds(1)
    path = tmp_path / "update.safetensors"
    update.save(path)
    header = read_whole(path)
    assert header.version == 2
    assert header.weights["0.weight"].difference
    assert header.weights["0.weight"].values_dtype == "int16"
    assert header.weights["0.weight"].after == update.after["0.weight"]
    assert not header.weights["1.num_batches_tracked"].difference
    raw = path.read_bytes()
    said, _ = parts_of(raw)
    packed = {"shira.words", "shira.checksums", "shira.weights", "shira.codes"}
    assert said.keys() - {"__metadata__"} == packed | {"1.num_batches_tracked.values"}
    with safe_open(path, "pt") as file:
        text = json.loads(zlib.decompress(file.get_tensor("shira.weights").numpy().tobytes()))
        assert list(text) == list(update.weights)
        assert sum(sum(one.get("bytes", [])) for one in text.values()) == file.get_tensor("shira.codes").numel()
    numbers = 8 * text["0.weight"]["bytes"][1]
    assert numbers < 4 * update.weights["0.weight"].nnz, "a few bits for each"

    def read(changed: bytes, says: str) -> None:
        path.write_bytes(changed)
        for way in (read_whole, Update.load):
            with pytest.raises(AdapterError, match=says):
                way(path)

    def retold(change: Callable[[str], str]) -> bytes:
        return with_tensor(
            raw, "shira.weights", lambda old: zlib.compress(change(zlib.decompress(old).decode()).encode())
        )

    at = text["0.weight"]["bytes"][0] + 7
    read(
        with_tensor(raw, "shira.codes", lambda old: old[:at] + b"\xff" + old[at + 1 :]),
        r"weight '0.weight': its values do not decode: .* modes of at most 15 low",
    )
    read(
        retold(lambda old: old.replace('"difference"', '"different!"')),
        r"'0\.weight': bytes must be 1 sizes, got \[\d+, \d+\]",
    )
    read(
        retold(lambda old: old.replace('"dtype":"bfloat16","count"', '"dtype":"int16","count"', 1)),
        "values that are differences must be of floats, got dtype int16",
    )
    older = raw.replace(b'"shira.version":"2"', b'"shira.version":"1"')
    read(older, "the metadata has no shira.weights")
    bomb = zlib.compress(b" " * 60_000_000)
    cannot = "its packed header cannot be read: "
    read(with_tensor(raw, "shira.weights", lambda _: bomb), cannot + "shira.weights must have at most 50,000,000 bytes")
    read(
        with_tensor(raw, "shira.weights", lambda old: old[:-5]), cannot + "shira.weights must be one whole zlib stream"
    )
    read(
        with_tensor(raw, "shira.weights", lambda old: old + b"x"),
        cannot + "shira.weights must be one whole zlib stream",
    )
    read(with_tensor(raw, "shira.weights", lambda old: b"x" + old), cannot + "Error -3 while decompressing")
    read(
        with_tensor(raw, "shira.codes", lambda old: old + b"x"),
        cannot + "the codes of the weights must fill shira.codes",
    )
    read(
        with_tensor(raw, "shira.codes", lambda old: old[:-1]), cannot + "the codes of the weights must fill shira.codes"
    )
    read(with_tensor(raw, "shira.codes", None), cannot + "the codes of the weights must fill shira.codes")
    read(with_tensor(raw, "shira.words", lambda old: old + b"x" * 8), "shira.words has more words than its weights")
    read(with_tensor(raw, "shira.words", lambda old: old[:-8]), "shira.words ends before the words of '2.weight'")
    read(with_tensor(raw, "shira.words", None), "shira.words ends before the words of '0.weight'")
    read(
        with_tensor(raw, "shira.words", lambda old: b"x" + old[1:]), "its metadata is not as it was written, by the che"
    )
    read(retold(lambda old: old.replace('"print"', '"other"')), "words must be some of seed, fingerprint, print, after")
    read(with_tensor(raw, "shira.checksums", lambda old: b"x" * 8 + old[8:]), "its metadata is not as it was written")
    read(with_tensor(raw, "shira.checksums", lambda old: old[:-8]), "its metadata is not as it was written")
    path.write_bytes(with_tensor(raw, "shira.checksums", None))
    assert Update.load(path).end == update.end
    header, data = parts_of(raw)
    header["__metadata__"]["shira.weights"] = "{}"
    read(file_of(header, data), cannot + "shira.weights must be metadata or a tensor, not both")


def test_a_file_that_is_not_packed_reads_too(tmp_path: Path) -> None:
    """The layout of version 1 with what version 2 may have: who writes such a file need not pack it."""
    _, (update,) = rounds(1)
    path = tmp_path / "packed.safetensors"
    update.save(path)
    with opened_adapter(path) as (_, file):
        data = file.map()
        headers = Packed.entries(file, json.loads(file.metadata["shira.weights"]))
        parts = {
            name: _file._bytes_part("U8", [data[place.begin : place.end]])
            for name, place in file.places.items()
            if not name.startswith("1.num")
        }
        parts |= {"1.num_batches_tracked.values": _file._bytes_part("I64", [b"\1" + bytes(7)])}
        metadata = {key: file.metadata[key] for key in ("shira.version", "shira.adapter")}
    about = json.loads(metadata["shira.adapter"])
    after = {name: one.pop("after") for name, one in headers.items()}
    about["provenance"]["shira.sync"]["after"] = after
    metadata |= {"shira.adapter": json.dumps(about), "shira.weights": json.dumps(headers)}
    old = tmp_path / "old.safetensors"
    _file.write_safetensors(old, dict(sorted(parts.items(), key=lambda one: one[1].dtype)), metadata)
    assert not read_whole(old).checksums
    assert Update.load(old).to_bytes() == update.to_bytes()
    served = model_of()
    follower = Receiver(served)
    follower.stage(old)
    follower.commit()
    assert follower.version == update.end


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


def test_a_file_with_values_is_an_adapter_too(tmp_path: Path) -> None:
    _, (update,) = rounds(1)
    path = tmp_path / "values.safetensors"
    update.save(path, differences=False)
    again = Update.from_adapter(Adapter.load(path))
    assert (again.start, again.end, again.after) == (update.start, update.end, update.after)
    assert replace(again, before={}).to_bytes() == path.read_bytes()
