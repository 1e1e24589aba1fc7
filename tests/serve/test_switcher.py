"""Switcher: exact, atomic, and only on the base an adapter was made for."""

import random

import pytest
import torch
from torch import nn

import shira_ops
from shira import Adapter, AdapterError, Entry, SparseTuner, Switcher, SwitchError, masks
from switcher_walk import Walk


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8)).to(dtype)


def adapter_of(model, mask, seed, targets=None, delta=False):
    generator = torch.Generator().manual_seed(seed)
    with SparseTuner(model, mask, targets) as tuner:
        with torch.no_grad():
            for values in tuner.parameters():
                values.copy_(torch.randn(values.shape, generator=generator))
        return tuner.adapter()


def bits(model):
    return [p.detach().clone().contiguous().view(torch.uint8) for p in model.parameters()]


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def switcher_of(dtype=torch.float32):
    model = model_of(dtype)
    switcher = Switcher(model)
    switcher.add("a", adapter_of(model, masks.Rand(density=0.1, seed=1), 1))
    switcher.add("b", adapter_of(model, masks.Rand(density=0.1, seed=2), 2))
    switcher.add("wide", adapter_of(model, masks.WeightMagnitude(density=0.2, granule=8), 3, r"^[02]$"))
    switcher.add("late", adapter_of(model, masks.Struct(density=0.3), 4, r"^3$"))
    return model, switcher


def expected(switcher, base, strengths, dtype):
    """The definition, in plain torch."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    names = [name for name in switcher.adapters if name in strengths]
    found = {}
    for weight_name, weight in base.items():
        flat = weight.view(-1)
        parts = []
        for name in names:
            entry = switcher.adapters[name].weights.get(weight_name)
            if entry is None or strengths[name] == 0:
                continue
            dense, mask = torch.zeros_like(flat), torch.zeros(flat.shape, dtype=torch.bool)
            rows = entry.indices.long()
            dense.view(-1, entry.granule)[rows] = entry.values.view(-1, entry.granule)
            mask.view(-1, entry.granule)[rows] = True
            parts.append((dense, mask, strengths[name]))
        total = flat.to(compute)
        for dense, mask, alpha in parts:
            alpha = torch.tensor(alpha, dtype=compute)
            total = torch.where(mask, total + alpha * (dense.to(compute) - flat.to(compute)), total)
        result = torch.where(sum(mask for _, mask, _ in parts) > 0, total.to(dtype), flat) if parts else flat
        for dense, mask, alpha in parts:
            alone = mask & (sum(m.int() for _, m, _ in parts) == 1)
            if alpha == 1:
                result = torch.where(alone, dense, result)
        found[weight_name] = result.view(weight.shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_state_is_the_definition_bit_for_bit(dtype):
    model, switcher = switcher_of(dtype)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for strengths in ({"a": 1.0}, {"a": 0.3}, {"b": -1.5}, {"wide": 0.5}, {"a": 1.0, "b": 1.0}, {"b": 0.5, "a": 0.25},
                      {"a": 0.7, "wide": 0.7, "late": 1.0}, {"a": 0.0, "b": 1.0}, {"late": 0.0}):  # fmt: skip
        switcher.activate(strengths)
        want = expected(switcher, base, strengths, dtype)
        new, fresh = switcher_of(dtype)
        fresh.activate(strengths)  # as the first that is on
        for name, p in model.named_parameters():
            assert torch.equal(p.detach(), want[name]), (strengths, name)
            assert torch.equal(new.get_parameter(name), want[name]), (strengths, name)
        fresh.deactivate()
        assert all(torch.equal(p, base[name]) for name, p in new.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_walks_end_at_the_base(dtype):
    model, switcher = switcher_of(dtype)
    base, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    choose = random.Random(0)
    fresh = {}
    for _ in range(300):
        names = choose.sample(["a", "b", "wide", "late"], choose.choice([0, 1, 1, 2, 3]))
        strengths = {name: choose.choice([1.0, 0.5, -0.25]) for name in sorted(names)}
        if strengths:
            switcher.activate(strengths)
        else:
            switcher.deactivate()
            assert equal(bits(model), base)
        state = bits(model)
        assert equal(fresh.setdefault(tuple(strengths.items()), state), state)
    switcher.deactivate()
    assert equal(bits(model), base)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_file_alpha_using_and_remove(tmp_path):
    model, switcher = switcher_of()
    base = bits(model)
    entry = switcher.adapters["a"].weights
    Adapter(entry, alpha=0.25).save(tmp_path / "quarter.safetensors")
    switcher.add("quarter", tmp_path / "quarter.safetensors")
    switcher.activate("a", alpha=0.25)
    by_hand = bits(model)
    switcher.activate("quarter")
    assert equal(bits(model), by_hand)
    assert switcher.active == {"quarter": 0.25}
    with switcher.using({"a": 1.0, "b": 1.0}) as inside:
        assert inside.active == {"a": 1.0, "b": 1.0}
    assert equal(bits(model), by_hand)
    with pytest.raises(ZeroDivisionError), switcher.using("b"):
        raise ZeroDivisionError
    assert equal(bits(model), by_hand)
    switcher.remove("quarter")
    assert switcher.active == {}
    assert equal(bits(model), base)
    assert "quarter" not in switcher.adapters
    with switcher.using({"a": 1.0, "b": 1.0}):
        switcher.activate({"a": 1.0, "b": 0.5, "wide": 1.0})
        switcher.deactivate("wide")
        assert switcher.active == {"a": 1.0, "b": 0.5}
        switcher.remove("b")
        assert switcher.active == {"a": 1.0}
    assert switcher.active == {}
    assert equal(bits(model), base)


def test_another_base_is_refused_and_nothing_changes():
    model, switcher = switcher_of()
    base = bits(model)
    good = switcher.adapters["a"]
    other = model_of()
    with torch.no_grad():
        other[2].weight[3, 5] += 1
    stranger = adapter_of(other, masks.Rand(density=0.1), 9)
    with pytest.raises(AdapterError, match=r"another base: the content of 1 of 3 weights differs .*2\.weight"):
        switcher.add("x", stranger)
    switcher.add("x", stranger, verify=False)
    entry = good.weights["0.weight"]

    def changed(name="0.weight", **fields):
        return Adapter({name: Entry(**{**{f: getattr(entry, f) for f in (
            "indices", "values", "shape", "dtype", "granule", "fingerprint")}, **fields})})  # fmt: skip

    cases = [
        (changed(name="9.weight"), "'9.weight' is not in the model"),
        (changed(shape=(64, 33)), r"must have shape \[64, 33\], got \[64, 32\]"),
        (changed(dtype=torch.float64, values=entry.values.double()), "must have dtype float64, got float32"),
        (changed(indices=entry.indices.flip(0)), "strictly increasing"),
        (changed(indices=entry.indices + 2000), "strictly increasing"),
    ]
    for adapter, says in cases:
        with pytest.raises(AdapterError, match=says):
            switcher.add("bad", adapter)
        assert "bad" not in switcher.adapters
    assert equal(bits(model), base)


def test_bad_calls_change_nothing():
    model, switcher = switcher_of()
    switcher.activate("a")
    state = bits(model)
    for call, kind, says in (
        (lambda: switcher.activate("nobody"), AdapterError, "no adapter 'nobody'"),
        (lambda: switcher.activate({}), ValueError, "at least one"),
        (lambda: switcher.activate("b", alpha=float("nan")), ValueError, "finite"),
        (lambda: switcher.activate({"a": 1.0}, alpha=1.0), ValueError, "alpha is for a single"),
        (lambda: switcher.add("a", switcher.adapters["b"]), AdapterError, "already added"),
        (lambda: switcher.remove("nobody"), AdapterError, "no adapter"),
    ):
        with pytest.raises(kind, match=says):
            call()
        assert equal(bits(model), state)
        assert switcher.active == {"a": 1.0}


def test_adding_while_another_is_active():
    model, switcher = switcher_of()
    late = adapter_of(model_of(), masks.Rand(density=0.1, seed=8), 8)
    switcher.activate("a")
    state = bits(model)
    switcher.add("later", late)
    assert equal(bits(model), state)


def test_a_replaced_parameter_is_noticed():
    model, switcher = switcher_of()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"0\.weight is no longer the parameter"):
        switcher.activate("a")


def test_tied_and_channels_last():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    adapter = adapter_of(model, masks.Rand(density=0.2), 1)
    switcher = Switcher(model)
    base = bits(model)
    switcher.add("a", adapter)
    switcher.activate("a")
    switcher.deactivate()
    assert equal(bits(model), base)

    conv = nn.Conv2d(4, 4, 3)
    entry = Entry(torch.tensor([1]), torch.zeros(1), (4, 4, 3, 3), torch.float32)
    conv = conv.to(memory_format=torch.channels_last)
    with pytest.raises(AdapterError, match=r"model: 'weight' must be contiguous; make it so with"):
        Switcher(conv).add("a", Adapter({"weight": entry}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_sequence_ends_where_a_fresh_activation_would(dtype):
    """A million of these: soak.py."""
    walk = Walk(dtype, seed=1)
    for number in range(1200):
        walk.step()
        if number % 100 == 0:
            walk.switcher.verify(full=True)
    walk.finish()
    assert min(walk.counts.values()) > 50
    assert len(walk.counts) == 9


def test_any_sequence_on_a_budget():
    """Room for the unions and little else: adapters and unions leave and come back all the time."""
    left = []
    walk = Walk(torch.bfloat16, seed=2, budget=5000)
    leave = walk.switcher._shelf._leave
    walk.switcher._shelf._leave = lambda added: (left.append(added.name), leave(added))
    for _ in range(400):
        walk.step()
        assert sum(memory.device for memory in walk.switcher.memory().values()) <= 5000
    walk.finish()
    assert left


# ---- fingerprints ------------------------------------------------------------------------------------------


def test_the_fingerprint_of_every_state_is_known_without_reading(monkeypatch):
    model, switcher = switcher_of(torch.bfloat16)
    names = [name for name, _ in model.named_parameters()]
    states = [{"a": 1.0}, {"a": 0.5}, {"b": 1.0, "a": 0.5}, {"wide": 1.0}, {"late": 0.25, "a": 1.0, "wide": 0.5}]

    def of_memory():
        return {name: int(shira_ops.fingerprint(p.detach())) % 2**64 for name, p in model.named_parameters()}

    def known():
        return {name: switcher.fingerprint(name) for name in names if name.endswith("weight")}

    found = []
    for state in states:
        switcher.activate(state)
        found.append(known())
        assert found[-1].items() <= of_memory().items()
    assert len({one["0.weight"] for one in found}) == len(found)
    switcher.deactivate()
    assert known().items() <= of_memory().items()
    assert switcher.fingerprint("0.bias") == of_memory()["0.bias"]  # no adapter is for it: read

    def never(*args, **kwargs):
        raise AssertionError("read the weight")

    for op in ("fingerprint", "fingerprint_at", "gather"):
        monkeypatch.setattr(shira_ops, op, never)
    for state, one in zip(states, found, strict=True):
        switcher.activate(state)
        assert known() == one


def test_fingerprints_without_a_check_of_the_base():
    model = model_of()
    adapter = adapter_of(model, masks.Rand(density=0.1), 1)
    switcher = Switcher(model)
    with torch.no_grad():
        model[0].weight.add_(1)  # not the base it was made for
    switcher.add("a", adapter, verify=False)
    switcher.activate("a", 0.5)
    assert switcher.fingerprint("0.weight") == int(shira_ops.fingerprint(model[0].weight.detach())) % 2**64
    switcher.verify(full=True)
    with pytest.raises(AdapterError, match="another base"):
        switcher.add("b", adapter)
    assert switcher.active == {"a": 0.5}


# ---- where adapters are ------------------------------------------------------------------------------------


def sizes(switcher):
    return {name: (memory.device > 0, memory.host > 0, memory.disk > 0) for name, memory in switcher.memory().items()}


def test_a_budget_keeps_the_adapters_used_last(tmp_path):
    model = model_of(torch.bfloat16)
    for number in range(4):
        adapter = adapter_of(model, masks.Rand(density=0.1, seed=number), number)
        adapter.save(tmp_path / f"{number}.safetensors")
    one = adapter.nbytes + 2 * adapter.nnz
    switcher = Switcher(model, budget=2 * one)
    everywhere = Switcher(model)
    for number in range(4):
        switcher.add(str(number), tmp_path / f"{number}.safetensors")
        everywhere.add(str(number), tmp_path / f"{number}.safetensors")
    assert everywhere.memory()["0"] == (one, 0, (tmp_path / "0.safetensors").stat().st_size)
    there, gone = (True, False, True), (False, False, True)
    assert sizes(switcher) == {"0": gone, "1": gone, "2": there, "3": there}
    for name in "0120321":
        switcher.activate(name)
        state = bits(model)
        switcher.deactivate()
        everywhere.activate(name)
        assert equal(bits(model), state)
        everywhere.deactivate()
    assert sizes(switcher) == {"0": gone, "1": there, "2": there, "3": gone}
    assert all(isinstance(adapter, Adapter) for adapter in switcher.adapters.values())

    # From one that is active to one that left, where they meet: the base's entries come from what was saved.
    switcher.activate("2")
    switcher.activate("0", 0.5)
    state = bits(model)
    switcher.verify(full=True)
    switcher.deactivate()
    everywhere.activate("0", 0.5)
    assert equal(bits(model), state)
    everywhere.deactivate()

    switcher.activate("1")
    state = bits(model)
    with pytest.raises(
        SwitchError,
        match=r"would need .* bytes on the device beside what is active, and the budget is .*: set switcher\.budget",
    ):
        switcher.activate({"1": 1.0, "2": 1.0})
    assert equal(bits(model), state)
    assert switcher.active == {"1": 1.0}
    adapter.save(tmp_path / "3.safetensors")
    assert sizes(switcher)["3"] == gone
    with pytest.raises(AdapterError, match=r"3\.safetensors has changed since '3' was added"):
        switcher.activate("3")
    assert switcher.active == {"1": 1.0}
    with pytest.raises(AdapterError, match="more than the budget of 10"):
        Switcher(model_of(torch.bfloat16), budget=10).add("1", tmp_path / "1.safetensors")
    # It may be changed at any time.
    later = Switcher(model_of(torch.bfloat16))
    later.budget = 10
    with pytest.raises(AdapterError, match="more than the budget of 10"):
        later.add("1", tmp_path / "1.safetensors")
    for make in (lambda: Switcher(model_of(torch.bfloat16), budget=-1), lambda: setattr(later, "budget", -1)):
        with pytest.raises(ValueError, match="budget must be a number of bytes or None, got -1"):
            make()
    later.budget = None
    later.add("1", tmp_path / "1.safetensors")


@pytest.mark.parametrize("spill", [False, True])
def test_adapters_without_a_file_leave_to_the_host_or_a_folder(tmp_path, spill):
    model = model_of()
    made = [adapter_of(model, masks.Rand(density=0.1, seed=number), number) for number in range(2)]
    states = []
    for adapter in made:
        with_one = Switcher(model)
        with_one.add("it", adapter)
        with with_one.using("it"):
            states.append(bits(model))
    budget = made[0].nbytes + 4 * made[0].nnz
    switcher = Switcher(model, budget=budget, spill=tmp_path / "spilled" if spill else None)
    for number, adapter in enumerate(made):
        switcher.add(str(number), adapter)
    for number in (0, 1, 0, 1):
        switcher.activate(str(number))
        assert equal(bits(model), states[number])
        switcher.deactivate()
        other = switcher.memory()[str(1 - number)]
        assert other.device == 0
        assert (other.host > 0, other.disk > 0) == (not spill, spill)
    # Active ones do not leave: an adapter that is added beside them waits outside.
    switcher.activate("0")
    switcher.add("third", made[1])
    assert sizes(switcher)["third"] == (False, not spill, spill)
    switcher.deactivate()
    switcher.activate("third")
    assert equal(bits(model), states[1])
    for name in ("0", "1", "third"):
        switcher.remove(name)
    assert switcher.memory() == {}
    assert list(tmp_path.glob("spilled/*")) == []


def test_unions_are_counted_and_only_so_many_are_kept():
    _, switcher = switcher_of()
    switcher.activate({"a": 1.0, "b": 1.0})
    assert sizes(switcher)["a + b"] == (True, False, False)
    for number in range(20):
        switcher.add(str(number), switcher.adapters["a"])
        switcher.activate({"b": 1.0, str(number): 1.0})
    assert sum(" + " in name for name in switcher.memory()) == 16
    switcher.remove("b")
    assert not any(" + " in name for name in switcher.memory())
    assert switcher.active == {"19": 1.0}


# ---- models ------------------------------------------------------------------------------------------------


def test_a_compiled_model_and_its_hooks_go_on():
    model, x = model_of(), torch.randn(4, 32)
    adapters = {name: adapter_of(model, masks.Rand(density=0.1, seed=n), n) for n, name in enumerate("ab")}
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    compiled = torch.compile(model, backend="aot_eager")
    switcher = Switcher(compiled)
    for name, adapter in adapters.items():
        switcher.add(name, adapter)
    with torch.no_grad():
        base = compiled(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for state in ({"a": 1.0}, {"a": 0.5, "b": 1.0}, {"b": 0.3}):
                switcher.activate(state)
                assert torch.equal(compiled(x), model(x))
                tripled = nn.functional.linear(x, model[0].weight, model[0].bias) * 3
                assert torch.equal(compiled(x), model[1:](tripled))
                assert not torch.equal(compiled(x), base)
            switcher.deactivate()
            assert torch.equal(compiled(x), base)


def test_gradients_flow_and_a_backward_over_switched_weights_is_refused():
    model, switcher = switcher_of()
    loss = model(torch.randn(4, 32, requires_grad=True)).sum()
    switcher.activate("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(torch.randn(4, 32)).sum().backward()
    assert model[0].weight.grad is not None
    switcher.deactivate()


def test_memory_mapped_weights_are_switched_in_the_file(tmp_path):
    path = tmp_path / "weights.bin"
    content = torch.randn(32 * 64)
    path.write_bytes(content.numpy().tobytes())
    model = model_of()
    model[0].weight.data = torch.from_file(str(path), shared=True, size=32 * 64).view(64, 32)
    switcher = Switcher(model)
    switcher.add("a", adapter_of(model, masks.Rand(density=0.1), 1))
    switcher.activate("a")
    entry = switcher.adapters["a"].weights["0.weight"]
    other = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    assert torch.equal(other[entry.indices.long()], entry.values)
    switcher.deactivate()
    assert path.read_bytes() == content.numpy().tobytes()


def random_entries(model, names, seed, granule=1):
    generator = torch.Generator().manual_seed(seed)
    entries = {}
    for name in names:
        weight = model.get_parameter(name).detach()
        limit = weight.numel() // granule
        indices = torch.randperm(limit, generator=generator)[: max(1, limit // 20)].sort().values.to(torch.int32)
        values = torch.randn(len(indices) * granule, generator=generator).to(weight.dtype)
        fingerprint = int(shira_ops.fingerprint(weight)) % 2**64
        entries[name] = Entry(indices, values, tuple(weight.shape), weight.dtype, granule, fingerprint)
    return entries


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qv"] + [
            "model.embed_tokens.weight"
        ]
    else:
        config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4)
        model = transformers.GPT2LMHeadModel(config)
        names = [f"transformer.h.{n}.attn.c_attn.weight" for n in (0, 1)] + ["transformer.wte.weight"]
    model.eval()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    base, tokens = bits(model), torch.arange(12).view(1, 12)
    entries = random_entries(model, names, 1)
    other = random_entries(model, names[:1], 2, granule=4)
    tied = random_entries(model, names[-1:], 3)[names[-1]]
    switcher = Switcher(model)
    switcher.add("one", Adapter(entries))
    switcher.add("two", Adapter(other, alpha=0.5))
    switcher.add("head", Adapter({"lm_head.weight": tied}))  # the same weight by its other name
    with torch.no_grad():
        logits = model(tokens).logits
        for state in ({"one": 1.0}, {"two": 0.5}, {"head": 1.0}, {"one": 0.5, "head": 0.5, "two": 1.0}):
            switcher.activate(state)
            switcher.verify(full=True)
            assert not torch.equal(model(tokens).logits, logits)
        switcher.deactivate()
        assert torch.equal(model(tokens).logits, logits)
    assert equal(bits(model), base)
    both = Adapter({names[-1]: tied, "lm_head.weight": tied})
    with pytest.raises(AdapterError, match=r"'lm_head\.weight' is the same \(tied\) weight as"):
        switcher.add("both", both)
