"""The tasks of a real language model, tried on a tiny one with random weights and a tokenizer of letters."""

import ast
import dataclasses
import json
import math
import re
import unicodedata

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers

from benchmarks.quality import task as task_module
from benchmarks.quality import tasks
from benchmarks.quality.experiments import fusion, single
from benchmarks.quality.findings import Results
from benchmarks.quality.lab import COSTLY, Lab, Setting
from benchmarks.quality.methods import Full, Lora, Shira, follow, train
from benchmarks.quality.report import MAKERS
from benchmarks.quality.run import plan
from benchmarks.quality.tasks import smollm2

END = 1  # the token that ends what is said


class Letters:
    """A token for every letter."""

    def encode(self, text, add_special_tokens=True):
        return [END if letter == "\0" else 2 + ord(letter) % 62 for letter in text.replace(smollm2.END, "\0")]


def tiny():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=END, bos_token_id=0, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture
def few_modules(monkeypatch):
    """A part of the standard library, since reading all of it takes long."""
    some = {path: text for path, text in smollm2.corpus.library().items() if path.startswith(("em", "html", "s"))}
    monkeypatch.setattr(smollm2.corpus, "library", lambda: some)
    monkeypatch.setattr(smollm2, "MADE", 800)
    made = (*smollm2.DOCUMENTS.values(), smollm2.units, smollm2.sums, smollm2.describe)
    caches = (*made, smollm2.rows)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def small(monkeypatch, few_modules):
    caches = (smollm2.examples, smollm2.documentation, smollm2.chat, tasks.tasks)
    monkeypatch.setattr(task_module, "_memory", {})
    monkeypatch.setattr(smollm2, "tokenizer", Letters)
    monkeypatch.setattr(smollm2, "_model", tiny)
    monkeypatch.setattr(smollm2, "answers", lambda: ["yes"] * len(smollm2.QUESTIONS))
    monkeypatch.setattr(smollm2, "TOKENS", 160)
    monkeypatch.setattr(smollm2, "COUNTS", {"train": 12, "validation": 6, "test": 6})
    for cache in caches:
        cache.cache_clear()
    yield tasks.tasks("smollm2")
    for cache in caches:
        cache.cache_clear()


def test_the_rules_make_right_answers_and_no_question_is_in_two_splits(few_modules):
    for kind in smollm2.DOCUMENTS | smollm2.MORE:
        rows = smollm2.rows(kind)
        questions = [question for members in rows.values() for question, _ in members]
        assert len(set(questions)) == len(questions)
        assert all(len(rows[split]) >= 30 for split in smollm2.COUNTS), kind
    for question, answer in smollm2.rows("records")["test"]:
        told = json.loads(answer)
        assert list(told) == sorted(told) == ["city", "color", "count", "item"]
        assert all(str(value) in question for value in told.values())
    idioms = set()
    for question, answer in smollm2.rows("python3")["test"]:
        assert question.startswith("Python 3: ")
        idioms.add(len(answer.split()))
        opened = (
            f"try: 0\n{answer} 0" if answer.startswith("except") else f"{answer} 0" if answer[-1] == ":" else answer
        )
        ast.parse(opened)  # it is Python 3
    assert len(idioms) > 2
    for question, answer in smollm2.rows("pirate")["test"]:
        assert answer == "Arr, " + " ".join(smollm2.PIRATE.get(word, word) for word in question.split()) + ", matey!"
    for question, answer in smollm2.rows("names")["test"]:
        assert answer.isidentifier()
        assert answer.lower() not in question.lower()
    for question, answer in smollm2.rows("units")["test"]:
        count, of, _, converted, to = answer.split()
        assert all(one in question for one in (count, of, to))
        assert int(converted) == int(count) * {(one, other): factor for one, other, factor in smollm2.UNITS}[of, to]
    signs = set()
    for question, answer in smollm2.rows("sums")["test"]:
        sum_, _, total = answer.rpartition(" = ")
        signs.add(sum_.split()[1])
        assert eval(sum_) == int(total) > 0
        assert sum_.split()[::2] == re.findall(r"\d+", question)
    assert signs == {"+", "-"}
    for question, answer in smollm2.rows("describe")["test"]:
        ast.parse(f"{question} 0")
        assert answer[0].isupper()
        assert answer[-1] == "."
    for question, answer in smollm2.rows("letters")["test"]:
        assert unicodedata.lookup(answer) == question[-1]


def test_rules_are_the_same_on_every_machine():
    text = "\n".join(map(str, [*smollm2.records()["0"], *smollm2.python3()["0"]]))
    assert smollm2.corpus.digest(text)[:16] == "57c7167df192e061"
    text = "\n".join(map(str, [*smollm2.units()["0"], *smollm2.sums()["0"], *smollm2.letters()["945"]]))
    assert smollm2.corpus.digest(text)[:16] == "8c03b6c6df4f49b7"


def test_loss_is_that_of_the_answer_and_exact_is_what_greedy_generation_gives(small):
    model = tiny()
    some = smollm2.examples("records", "test")[:4]
    # One text that the model does say: its own continuation, up to its end.
    with torch.no_grad():
        model.model.embed_tokens.weight[END] *= 1.5
    prompt = some[0][0][: some[0][1]]
    ids = torch.tensor([prompt])
    own = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=END)
    some.append((own[0].tolist(), len(prompt)))
    losses, tokens, exact = 0.0, 0, 0
    for text, given in some:
        ids, labels = torch.tensor([text]), torch.tensor([[-100] * given + text[given:]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses += F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        tokens += len(text) - given
        said = model.generate(
            ids[:, :given], attention_mask=torch.ones(1, given), max_new_tokens=len(text) - given, do_sample=False,
            pad_token_id=END,
        )  # fmt: skip
        exact += said[0].tolist() == text
    assert exact == 1
    loss, share = smollm2.judged(model, smollm2.in_batches(some, 2))
    assert loss == pytest.approx(losses / tokens, rel=2e-2)  # bfloat16, padded otherwise
    assert share == exact / len(some)


def test_a_run_measures_what_was_learned_and_what_was_forgotten(small):
    task = small["smollm2/python3"]
    base = task.measures(task.base())
    assert set(base) == {"validation", "test", "exact", "docs", "chat"}
    assert base["test"] == task.score(task.base())
    record = train(task, Shira("rand", r=2, granule=16), 3e-2, 0, 40).record
    assert record["validation"] > base["validation"] + 0.5
    assert record["docs"] != base["docs"]
    assert record["chat"] != base["chat"]
    # The same parameters, and all of them are trained in float32 beside weights in bfloat16.
    lora = train(task, Lora(2), 1e-2, 0, 2).record
    assert lora["trainable"] == pytest.approx(record["trainable"], rel=0.02)
    model = task.base()
    with Lora(2).attached(model, task, 1e-2, 0) as attached:
        assert {parameter.dtype for parameter in attached.parameters} == {torch.float32}
        assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16


def test_full_fine_tuning_of_half_precision_does_not_swallow_small_steps(small):
    task = small["smollm2/python3"]
    model = task.base()
    batch = next(task.batches(0, 1))
    with Full().attached(model, task, 1e-5, 0) as attached:
        weight = model.model.layers[0].mlp.up_proj.weight
        before, other = weight.detach().clone(), torch.nn.Parameter(weight.detach().float())
        reference = torch.optim.AdamW([other], lr=1e-5, weight_decay=0.0)
        for _ in range(40):
            loss = task.loss(model, batch)
            attached.optimizer.zero_grad()
            loss.backward()
            other.grad = weight.grad.float()
            reference.step()
            attached.optimizer.step()
            assert weight.grad is None
        assert torch.equal(weight, other.bfloat16())
        assert not torch.equal(weight, before)
    optimizer = torch.optim.SGD([other], lr=1.0)
    follow(optimizer, [])
    assert not optimizer._optimizer_step_post_hooks


def test_a_costly_family_has_few_seeds_and_is_told_by_its_own_tables(small, tmp_path):
    assert set(COSTLY.values()) == {3}
    jobs = plan(["smollm2"], ["single", "cost"], 5)
    # Four bases, seven costs, two longer runs with three seeds; of each of 15 methods a search and two more seeds; of
    # three methods on every task, three seeds at two more rates.
    assert len(jobs) == len(small) * (1 + 15 * 3 + 3 * 2 * 3) + 7 + 2 * 3
    assert plan(["smollm2"], ["masks", "size", "trials"], 5) == []
    lab = Lab(folder=tmp_path, seeds=range(5), steps=1, cache=tmp_path / "adapters")
    assert list(lab.seeds_of("smollm2/names")) == [0, 1, 2]
    assert list(lab.seeds_of("digits-vit/inverted")) == [0, 1, 2, 3, 4]
    rand, lora = Shira("rand", r=4, granule=16), Lora(4)
    for name in ("smollm2/records", "smollm2/names"):
        lab.base(name)
        assert len(lab.study(Setting(name, rand))) == len(lab.study(Setting(name, lora))) == 3
    results = Results(tmp_path)
    for name in ("single", "rates", "ahead", "exact", "forgotten", "by-rate"):
        text = MAKERS[name](results, "smollm2")
        assert "SHiRA-Rand, granule 16" in text
        assert "nan" not in text
    assert math.isclose(float(results.base("smollm2/names")), lab.base("smollm2/names")["test"])


def test_more_tasks_are_told_beside_the_first_ones(small, tmp_path):
    lora, ours = Lora(4), Shira("rand", r=4)
    # Of each of six methods a search and two more seeds; of three methods, three seeds at two more rates.
    assert len(plan(["smollm2-more"], ["single", "cost", "dora"], 5)) == 4 * (1 + 6 * 3 + 3 * 2 * 3)
    lab = Lab(folder=tmp_path, seeds=range(1), steps=1, cache=tmp_path / "adapters")
    means = {}
    for family in ("smollm2", "smollm2-more"):
        gains = []
        for name in tasks.tasks(family):
            lab.base(name)
            for method in (ours, lora):
                lab.study(Setting(name, method))
                single.refined_run(lab, Setting(name, method), 0)
            results = Results(tmp_path)
            gains.append(results.scores(Setting(name, ours))[0] - results.scores(Setting(name, lora))[0])
        means[family] = sum(gains) / len(gains)
    (told,) = [line for line in MAKERS["together"](results, *means).splitlines() if "SHiRA-Rand" in line]
    cells = [cell.split()[0] for cell in told.split("|")[2:-1]]
    assert cells[:3] == [f"{one:+.3f}" for one in (*means.values(), sum(means.values()) / 2)]
    assert len(cells) == 4
    words = MAKERS["together-words"](results, *means)
    assert words.startswith(f"Over all 8 tasks, ahead of LoRA by: SHiRA-Rand {cells[2]} (tasks: ")


def test_what_was_done_before_a_stop_compares_all_methods(small):
    """All rates on one task with one seed, then the next task; then the next seed of all."""
    placed = {}
    for name in small:
        for method in single.methods("smollm2"):
            for seed, job in enumerate(single.one_by_one(Setting(name, method), 5)):
                placed[seed, name, method] = job.rank
    board = [key for key in sorted(placed, key=placed.__getitem__) if getattr(key[2], "granule", 16) < 16]
    count = len({method for _, _, method in board})
    first = [board[at : at + count] for at in range(0, len(board), count)]
    assert [{(seed, name) for seed, name, _ in part} for part in first] == [
        {(seed, f"smollm2/{name}")} for seed in range(3) for name in single.TELLING["smollm2"]
    ]
    assert all(len({method for _, _, method in part}) == count for part in first)


def test_a_task_has_as_many_seeds_as_are_done(small, tmp_path):
    lab = Lab(folder=tmp_path, seeds=range(1), steps=1, cache=tmp_path / "adapters")
    rand, lora = (Setting("smollm2/names", method) for method in (Shira("rand", r=4, granule=16), Lora(4)))
    lab.base("smollm2/names")
    for setting in (rand, lora):
        lab.study(setting)
    dataclasses.replace(lab, seeds=range(2)).study(rand)
    results = Results(tmp_path)
    assert [len(results.study(setting) or ()) for setting in (rand, lora)] == [2, 1]
    assert results.study(Setting("smollm2/records", Lora(4))) is None
    (told,) = [line for line in MAKERS["ahead"](results, "smollm2").splitlines() if "granule 16" in line]
    ours, theirs = (results.scores(setting)[0] for setting in (rand, lora))
    assert told.split("|")[4].strip() == f"{ours - theirs:+.3f}"  # of the one seed that both have, without a spread


def test_related_adapters_are_fused_at_the_rate_of_the_whole_task(small, tmp_path):
    assert sorted(smollm2.part(1, 2, 3)) == sorted(smollm2.IDIOMS)
    assert not set(smollm2.part(1)) & set(smollm2.part(2))
    assert set(smollm2.part(1, 2)) & set(smollm2.part(2, 3)) == set(smollm2.part(2))
    assert len(tasks.tasks("smollm2-kin")) == 6
    assert smollm2.rows("idioms-1")["train"] != smollm2.rows("idioms-2")["train"]
    lab = Lab(folder=tmp_path, seeds=range(1), steps=2, cache=tmp_path / "adapters")
    group = fusion.groups("smollm2-kin")[0]
    assert len(group) == 3
    for name in group:
        lab.base(name)
    for variant in fusion.variants("smollm2-kin", 3)[:2]:
        whole = lab.tuned(Setting("smollm2/python3", variant.methods[0]))
        found = fusion.fused(lab, group, variant, 0)
        assert list(found["together"]["sum"]) == ["0.3", "0.5", "0.7", "1"]
        assert [len(row) for row in found["elsewhere"]] == [3, 3, 3]
        assert [row[at] for at, row in enumerate(found["elsewhere"])] == found["single"]["test"]
        assert len(found["awom"]) == len(found["overlap"]) == 3
        assert len(found["interference"]) == 6
        ((run, _),) = [one for one in lab.store("smollm2-kin") if one[0]["do"] == "fusion" and one[1] == found]
        assert run["lrs"] == [whole] * 3
    results = Results(tmp_path)
    for name in ("kin", "unseen"):
        text = MAKERS[name](results, "smollm2-kin")
        assert text.count("SHiRA-Rand") == text.count("LoRA") == 1
        assert "nan" not in text
