"""The experiments still run, each at a tiny scale on the real digits; the page is what their results say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time

import pytest
import torch

pytest.importorskip("sklearn", reason="pip install -e '.[test]'")
pytest.importorskip("peft", reason="pip install -e '.[test]'")
pytest.importorskip("rich", reason="pip install -e '.[test]'")

from benchmarks.quality import (
    findings,
    front,
    language,
    methods,
    report,
    rules,
    sentences,
    store,
    tables,
    tasks,
    verdict,
    words,
)
from benchmarks.quality import lab as lab_module
from benchmarks.quality import task as task_module
from benchmarks.quality.experiments import EXPERIMENTS, fusion, masks, single, size
from benchmarks.quality.findings import Fused, Results
from benchmarks.quality.lab import BETWEEN, RATES, Lab, OtherBase, Setting, Stop
from benchmarks.quality.language import LANGUAGE
from benchmarks.quality.methods import Dora, Full, Lora, Shira, ShiraDora, from_description, train
from benchmarks.quality.run import plan
from benchmarks.quality.sentences import SENTENCES
from benchmarks.quality.tasks import digits
from benchmarks.quality.verdict import VERDICT
from shira import Switcher

FAMILY = "digits-mlp-128"


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Two tasks for a base that has hardly been trained; returns a lab whose runs are three steps."""
    monkeypatch.setattr(task_module, "CACHE", tmp_path)
    monkeypatch.setattr(task_module, "_memory", {})
    monkeypatch.setattr(digits, "PRETRAIN_STEPS", 20)
    monkeypatch.setattr(digits, "SHIFTS", {name: digits.SHIFTS[name] for name in ("upright", "rotated-45", "permuted")})
    monkeypatch.setattr(masks, "DENSITIES", (0.01,))
    monkeypatch.setattr(masks, "GRANULES", (1, 16))
    monkeypatch.setattr(fusion, "ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(size, "FRACTIONS", (0.1, 1.0))
    monkeypatch.setattr(size, "DENSITIES", (0.01,))
    tasks.tasks.cache_clear()
    yield Lab(folder=tmp_path / "results", seeds=range(2), steps=3, cache=tmp_path / "adapters")
    tasks.tasks.cache_clear()


# What the sentences that any base can have begin with; the others speak of language models and rewards.
SAID = {"beside-lora": "- SHiRA-Rand: ", "default": "Ahead of Rand ", "fused-words": "On "}


def test_every_experiment_runs_and_the_report_tells_it(tiny, tmp_path):
    (tiny.folder).mkdir()
    (tiny.folder / "switching.json").write_text((store.RESULTS / "switching.json").read_text())
    jobs = plan([FAMILY], list(EXPERIMENTS), 2)
    assert [job.rank for job in jobs] == sorted(job.rank for job in jobs)
    for job in jobs:
        job.do(tiny)
    kept = (tiny.folder / f"{FAMILY}.jsonl").read_bytes()
    done = {run["do"] for run, _ in store.Store(FAMILY, tiny.folder)}
    assert done == {"weights", "base", "train", "crowding", "fusion", "transfer"}

    # Everything is known now: running it again takes no time, and writes nothing.
    again = Lab(folder=tiny.folder, seeds=range(2), until=0)
    for job in jobs:
        job.do(again)
    assert (tiny.folder / f"{FAMILY}.jsonl").read_bytes() == kept

    results = Results(tiny.folder, seeds=2)
    template = "".join(path.read_text() for path in report.TEMPLATES.glob("*.md"))
    names = [match.split() for match in re.findall(r"\{\{(.+?)\}\}", template)]
    assert {name for name, *_ in names} <= set(report.MAKERS)
    for name in sorted(set(report.MAKERS) - {"plot", "style", *LANGUAGE} - (set(SENTENCES) - set(SAID))):
        arguments = {"compared": ["granules"], "front": ["switch"], "switching": []}.get(name, [])
        families = [] if name in ("switching", "coarse", "verdict-granules") else [FAMILY]
        text = report.page(f"{{{{{' '.join([name, *families, *arguments])}}}}}", results)
        starts = SAID.get(name, ("|", "Mean over", "Over"))
        assert text.startswith(starts), (name, text)
        assert "nan" not in text

    drawn = front.points(results, [FAMILY])
    names = {one["name"] for one in drawn}
    assert {"Rand 1 %", "Rand 1 %, granule 16", "LoRA"} <= names
    assert len(names) == len(drawn)
    for one in drawn:
        assert 0 <= one["accuracy"] <= 1
        assert one["switch_seconds"] > 0
        assert one["file_bytes"] > 0


def test_large_models_fuse_at_few_strengths_and_the_report_tells_it(tiny, monkeypatch):
    monkeypatch.setattr(fusion, "LARGE", (FAMILY,))
    monkeypatch.setattr(fusion, "FEW_ALPHAS", (0.5, 1.0))
    for job in plan([FAMILY], ["fusion"], 2):
        job.do(tiny)
    results = Results(tiny.folder, seeds=2)
    fused = Fused(results, FAMILY)
    assert fused.groups() == [tuple(list(tasks.tasks(FAMILY))[:2])]
    several = ["lora", "rand, one mask", "snip, own masks"]
    slower = [f"{name}, {text}" for text in fusion.SLOWER for name in several]
    assert fused.variants() == [*several, *slower, "rand, disjoint"]
    assert all(list(run["together"]) == ["sum"] for runs in fused.runs.values() for run in runs)
    assert all(list(run["together"]["sum"]) == ["0.5", "1"] for runs in fused.runs.values() for run in runs)
    assert "sum, best strength" in tables.merges_table(results, FAMILY)
    assert "DARE" not in tables.merges_table(results, FAMILY)
    assert "rand" not in tables.metrics_table(results, FAMILY)
    assert tables.fusion_table(results, FAMILY).count("SHiRA-Rand") == 4


def test_every_adapter_gets_a_strength_of_its_own(tiny, monkeypatch):
    group = tuple(tasks.tasks(FAMILY))[:2]
    monkeypatch.setitem(fusion.CHOSEN, FAMILY, (tuple(name.partition("/")[2] for name in group),))
    monkeypatch.setattr(fusion, "LARGE", (*fusion.LARGE, FAMILY))
    monkeypatch.setattr(fusion, "FEW_ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(fusion, "SAMPLE", 1)
    variant = fusion.variants(FAMILY, 2)[0]
    found = fusion.balanced(tiny, group, variant, 0)
    together = fusion.fused(tiny, group, variant, 0)["together"]["sum"]
    assert sum(found["validation"]) >= max(sum(one["validation"]) for one in together.values())

    # What was kept is what two adapters at these strengths score.
    settings = [Setting(name, method) for name, method in zip(group, variant.methods, strict=True)]
    model = tasks.task(group[0]).base()
    switcher = Switcher(model)
    for setting in settings:
        switcher.add(setting.task, tiny.adapter(setting, tiny.tuned(setting), 0))
    switcher.activate(dict(zip(group, found["strengths"], strict=True)))
    assert [tasks.task(name).score(model, "test") for name in group] == pytest.approx(found["test"], abs=1e-6)


def test_strengths_are_climbed_one_step_at_a_time():
    def near(at):
        return -sum((a - b) ** 2 for a, b in zip(at, (5, 0, 3), strict=True))

    assert fusion.climbed([2, 2, 2], near)[0] == [5, 0, 3]
    assert fusion.climbed([0, 5], lambda at: 0.0) == ([0, 5], 3)


def test_what_was_not_run_is_said(tmp_path):
    text = report.page("before\n{{single digits-mlp}}\nafter", Results(tmp_path))
    assert text == "before\n*Not yet run.*\nafter"


@pytest.mark.parametrize(
    "method",
    [Shira("rand", r=1), Shira("snip", r=1, granule=16, balanced=True), ShiraDora("wm", r=1), Lora(1), Dora(1), Full()],
    ids=lambda method: method.kind + str(getattr(method, "mask", "")),
)
def test_an_adapter_is_what_was_trained(tiny, method):
    """Switched on on a fresh base it scores as the trained model did; and the same run gives the same bits again."""
    task = tasks.task(f"{FAMILY}/permuted")
    trained, again = (train(task, method, 3e-2, 1, 12) for _ in range(2))
    assert trained.record == again.record
    model = task.base()
    switcher = Switcher(model)
    switcher.add("it", trained.adapter)
    switcher.activate("it")
    for split in ("validation", "test"):
        assert task.score(model, split) == trained.record[split]
    switcher.deactivate()
    assert task.score(model) != trained.record["test"]
    assert from_description(json.loads(json.dumps(method.describe()))) == method


def test_equal_parameters(tiny):
    task = tasks.task(f"{FAMILY}/permuted")
    lora = train(task, Lora(2), 1e-2, 0, 1).record["trainable"]
    for mask in ("rand", "wm", "snip"):
        assert train(task, Shira(mask, r=2), 1e-2, 0, 1).record["trainable"] == lora
    assert 0.9 * lora < train(task, Shira("struct", r=2), 1e-2, 0, 1).record["trainable"] <= lora
    rows = sum(task.base().get_parameter(f"{name}.weight").shape[0] for name in ("first", "second", "third"))
    assert train(task, Dora(2), 1e-2, 0, 1).record["trainable"] == lora + rows
    behind = train(task, ShiraDora("rand", r=2, times=3), 1e-2, 0, 1).record
    assert (behind["trainable"], behind["nnz"]) == (3 * lora + rows, lora)


def test_dora_behind_a_mask_refuses_what_it_does_not_do(tiny):
    task = tasks.task(f"{FAMILY}/permuted")
    for method in (ShiraDora("rand", density=0.01), ShiraDora("snip", r=2)):
        with pytest.raises(ValueError, match="is for r=, the masks rand and wm, and tasks without a head"):
            train(task, method, 1e-2, 0, 1)


def test_a_switch_costs_the_lines_it_touches(tiny):
    task = tasks.task(f"{FAMILY}/permuted")
    single = train(task, Shira("rand", density=0.04), 1e-2, 0, 1).record
    assert single["lines"] == pytest.approx(1 - 0.96**32, abs=0.05)
    block = train(task, Shira("rand", density=0.04, granule=32), 1e-2, 0, 1).record
    assert block["lines"] == pytest.approx(0.04, abs=0.002)
    assert single["nnz"] == pytest.approx(block["nnz"], rel=0.03)  # whole granules
    assert block["bytes"] < single["bytes"]


@pytest.mark.parametrize("granule", [1, 8])
@pytest.mark.parametrize("mask", ["rand", "wm"])
def test_balanced_masks_have_as_many_granules_in_every_row(mask, granule):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[3] *= 100  # so that the largest magnitudes are all here
    density = 0.25
    one = Shira(mask, density=density, granule=granule, balanced=True).make(5)
    indices = one("w", weight)
    counts = torch.bincount(indices // (64 // granule), minlength=24)
    assert len(indices) == one.count("w", weight)
    assert int(counts.max() - counts.min()) <= 1
    if mask == "wm":
        best = weight.abs().view(24, -1, granule).sum(2).topk(int(counts.min()), dim=1).indices
        for row in range(24):
            assert {row * (64 // granule) + int(column) for column in best[row]} <= set(indices.tolist())
    other = Shira(mask, density=density, granule=granule, balanced=True, part=1).make(5)("w", weight)
    assert not torch.isin(other, indices).any()


class Known(Lab):
    """A lab whose validation scores are known."""

    def __init__(self, curve, seeds=(0,)):
        super().__init__(seeds=seeds)
        self.curve, self.tried = curve, []

    def base(self, task):
        return {"validation": -5.0}

    def train(self, setting, lr, seed):
        if (lr, seed) not in self.tried:
            self.tried.append((lr, seed))
        return {"validation": self.curve(lr, seed), "loss": 1 / lr, "test": None}

    def tune(self, budget=6):
        return self.tuned(Setting("x/y", Shira(r=1), budget=budget)), [lr for lr, _ in self.tried]


def test_the_rate_is_searched_up_and_down_within_the_budget():
    def search(curve, budget=6):
        return Known(lambda lr, _: curve(lr)).tune(budget)

    assert search(lambda lr: -abs(math.log10(lr) - math.log10(1e-2))) == (1e-2, [1e-1, 3e-2, 1e-2, 3e-3])
    assert search(lambda lr: lr if lr < 2 else None) == (1.0, [1e-1, 3e-2, 3e-1, 1.0, 3.0])
    rate, tried = search(lambda lr: -lr, budget=3)
    assert (rate, len(tried)) == (1e-2, 3)
    # The only difference is that the loss falls as the rate rises.
    assert search(lambda lr: 0.5) == (RATES[-1], [1e-1, 3e-2, 3e-1, 1.0, 3.0])
    # A peak below the base's -5 does not count: lower rates may be better.
    collapsed = {1e-1: -8.0, 3e-2: -6.0, 1e-2: -7.0, 3e-3: 1.0, 1e-3: 0.0}
    assert search(collapsed.__getitem__) == (3e-3, list(collapsed))
    # Rates that are too low to change anything do not keep it from going up.
    idle = {1e-1: -6.0, 3e-2: -6.5, 3e-1: -5.5, 1.0: 0.5, 3.0: 0.0}
    assert search(idle.__getitem__) == (1.0, list(idle))


def test_a_rate_that_some_seeds_fail_at_yields_to_a_lower_one_that_is_better_in_the_mean():
    peak = {3e-2: 0.7, 1e-1: 0.8, 3e-1: 0.6}
    unlucky = Known(lambda lr, seed: 0.1 if lr == 1e-1 and seed > 2 else peak[lr], seeds=range(5))
    assert unlucky.tune()[0] == 3e-2
    assert Known(lambda lr, seed: None if lr == 1e-1 and seed > 2 else peak[lr], seeds=range(5)).tune()[0] == 3e-2
    # If only one seed of five fails, the mean at the higher rate is still better.
    assert Known(lambda lr, seed: 0.5 if lr == 1e-1 and seed > 3 else peak[lr], seeds=range(5)).tune()[0] == 1e-1
    # Where the seeds agree, no other rate is tried.
    steady = Known(lambda lr, seed: peak[lr] - seed / 1000, seeds=range(5))
    assert steady.tune()[0] == 1e-1
    assert (3e-2, 1) not in steady.tried


def test_where_runs_take_long_only_a_rate_that_some_seeds_fail_at_yields(monkeypatch):
    monkeypatch.setattr(lab_module, "COSTLY", {"x": 3})
    peak = {3e-2: -0.7, 1e-1: -0.5, 3e-1: -0.9}

    def lab(done, failed):
        one = Known(lambda lr, seed: failed if (lr, seed) == (1e-1, 2) else peak[lr], seeds=range(5))
        monkeypatch.setattr(one, "store", lambda family: {run["seed"]: run for run in done})
        return one

    every = [Setting("x/y", Shira(r=1)).run(1e-1, seed) for seed in range(3)]
    monkeypatch.setattr(Setting, "run", lambda self, lr, seed: seed)
    assert lab(every, failed=-4.0).tune()[0] == 3e-2
    assert lab(every, failed=None).tune()[0] == 3e-2
    assert lab(every, failed=-0.9).tune()[0] == 1e-1  # seeds that differ, and none that failed
    waiting = lab(every[:2], failed=-4.0)
    assert waiting.tune()[0] == 1e-1
    assert {seed for _, seed in waiting.tried} == {0}


def test_the_lowest_good_rate_and_the_finer_search_start_from_what_was_found():
    setting = Setting("x/y", Shira(r=1))
    level = Known(lambda lr, _: {1e-1: -0.20, 3e-2: -0.21, 1e-2: -0.5, 3e-1: -0.19, 1.0: -0.9}[lr])
    assert (level.searched(setting), level.spared(setting)) == (3e-1, 3e-2)
    # A lower rate that is clearly worse is not good; one that diverged least of all.
    steep = Known(lambda lr, _: {1e-1: -0.20, 3e-2: -0.24, 3e-1: None}[lr])
    assert (steep.searched(setting), steep.spared(setting)) == (1e-1, 1e-1)

    peak = {1e-1: 0.5, 3e-2: 0.4, 3e-1: 0.3, 5e-2: 0.45, 2e-1: 0.6}
    finer = Known(lambda lr, _: peak[lr])
    assert (finer.searched(setting), finer.refined(setting)) == (1e-1, 2e-1)
    assert sorted(finer.tried) == [(lr, 0) for lr in sorted(peak)]
    assert Known(lambda lr, _: {**peak, 2e-1: None}[lr]).refined(setting) == 1e-1
    assert [low < one < high for low, one, high in zip(RATES, BETWEEN, RATES[1:], strict=False)] == [True] * 11


def test_what_is_forgotten_is_told_where_as_much_was_learned(monkeypatch):
    """The lowest rate with every seed at which the validation loss is LoRA's at LoRA's best, to within 0.03."""
    ours, lora = Setting("smollm2/names", Shira("rand", r=4)), Setting("smollm2/names", Lora(4))
    scores = {3e-3: [-1.0], 1e-2: [-0.9, -1.1, -1.08], 3e-2: [-0.8, -0.9, -0.7], 1e-4: [-2.0, -2.0, -2.0]}
    runs = [
        ({**ours.run(lr, seed), **extra}, {"validation": one, "test": one if not extra else 9.0})
        for lr, several in scores.items()
        for seed, one in enumerate(several)
        for extra in ({}, {"steps": 7})
    ]
    runs += [(lora.run(1e-3, seed), {"validation": one, "test": one}) for seed, one in enumerate([-1.0, -1.0, -1.0])]
    results, lora_run = Results(), lora.method.describe()
    monkeypatch.setattr(results.lab, "store", lambda family: runs)
    monkeypatch.setattr(results, "study", lambda one: [found for run, found in runs if run["method"] == lora_run])
    rate, found = results.matched(ours, lora)
    assert (rate, [one["test"] for one in found]) == (1e-2, scores[1e-2])
    assert list(results.by_rate(ours)) == sorted(scores)
    runs[:] = [(run, result) for run, result in runs if run["lr"] not in (1e-2, 3e-2)]
    assert results.matched(ours, lora) is None


@pytest.mark.parametrize(("times", "expected"), [(1, 3), (3, 3), (10, 2), (100, 1)])
def test_within_a_step_of_so_many_times_the_rate(times, expected):
    assert rules.within([1.0, 1 / 3, 3.3, 10.0, 100.0], times) == expected


def test_results_survive_a_cut_line(tmp_path):
    first = store.Store("x", tmp_path)
    first.add({"task": "x/a", "lr": 0.1}, {"test": 0.5, "loss": math.nan, "many": [1.0, math.inf]})
    first.add({"task": "x/b", "lr": 0.1}, {"test": 1 / 3})
    whole = first.path.read_bytes()
    for cut in (1, 5, 20):
        first.path.write_bytes(whole[:-cut])
        again = store.Store("x", tmp_path)
        assert len(again) == 1
        assert again.get({"lr": 0.1, "task": "x/a"}) == {"test": 0.5, "loss": None, "many": [1.0, None]}
        assert again.get({"task": "x/b", "lr": 0.1}) is None
        assert again.add({"task": "x/b", "lr": 0.1}, {"test": 1 / 3}) == {"test": 0.3333333}
        assert first.path.read_bytes() == whole
    first.path.write_bytes(b'{"run": 1}\n' + whole)
    with pytest.raises(ValueError, match="line 1 is not a result"):
        store.Store("x", tmp_path)


def test_the_time_is_up_between_two_runs(tiny):
    setting = Setting(f"{FAMILY}/permuted", Shira(r=1))
    tiny.until = time.time() - 1
    with pytest.raises(Stop):
        tiny.train(setting, 0.1, 0)
    tiny.until = math.inf
    result = tiny.train(setting, 0.1, 0)
    tiny.until = 0
    assert tiny.train(setting, 0.1, 0) == result


def test_results_of_another_base_are_refused(tiny, monkeypatch):
    setting = Setting(f"{FAMILY}/permuted", Shira(r=1))
    result = tiny.train(setting, 0.1, 0)
    path = tiny.store(FAMILY).path
    (run, weights), *_ = store.Store(FAMILY, tiny.folder)
    assert run == {"do": "weights", "task": f"{FAMILY}/rotated-45"}
    kept, text = weights["fingerprint"], path.read_text()

    def fresh():
        """A process of its own, which reads the results and the base anew."""
        monkeypatch.setattr(task_module, "_memory", {})
        return dataclasses.replace(tiny, _stores={}, _same=set())

    # The base is read from its file again.
    fresh().train(setting, 0.1, 1)
    text = path.read_text()
    # One weight of the last layer differs, in its last bit.
    file = task_module.CACHE / f"{FAMILY}.pt"
    state = torch.load(file, weights_only=True)
    last = list(state)[-1]
    state[last][-1] = torch.nextafter(state[last][-1], torch.tensor(9.0))
    torch.save(state, file)
    other = fresh()
    with pytest.raises(OtherBase, match=rf"{FAMILY}.jsonl are of a base with other weights \(fingerprint {kept}\)"):
        other.train(setting, 0.1, 2)
    assert path.read_text() == text
    assert other.train(setting, 0.1, 0) == result  # what was kept can be read

    # Results from before fingerprints were kept: the next run says which base they go on with.
    path.write_text("".join(line for line in text.splitlines(True) if '"weights"' not in line))
    again = fresh()
    assert again.train(setting, 0.1, 0) == result
    again.train(setting, 0.1, 2)
    (found,) = (one["fingerprint"] for run, one in store.Store(FAMILY, tiny.folder) if run["do"] == "weights")
    assert found != kept


def test_nothing_is_added_to_results_whose_base_is_lost(tiny, monkeypatch):
    first = next(iter(tasks.tasks(FAMILY)))
    tiny.store(FAMILY).add({"do": "weights", "task": first}, {"fingerprint": lab_module.LOST})
    monkeypatch.setattr(lab_module, "print_of", lambda task: pytest.fail("it was made for nothing"))
    with pytest.raises(OtherBase, match=r"jsonl is lost: begin anew in another folder \(--results\)"):
        tiny.base(first)


def test_a_head_of_its_own_is_not_part_of_the_base(tiny, monkeypatch):
    task = tasks.task(f"{FAMILY}/permuted")
    whole = dataclasses.replace(task, whole=r"^third\.")
    assert lab_module.print_of(task) == lab_module.print_of(task) != lab_module.print_of(whole)
    model = task.base()
    with torch.no_grad():
        model.third.weight.add_(1)
    monkeypatch.setattr(type(task), "base", lambda self: model)
    before = lab_module.print_of(whole)
    with torch.no_grad():
        model.third.weight.add_(1)
    assert lab_module.print_of(whole) == before


def test_a_result_belongs_to_all_that_was_run():
    """No two settings share a key, and writing out a default does not make another."""
    base = Setting("x/y", Shira("rand", r=2))
    others = [
        dataclasses.replace(base, **change)
        for change in (
            {"task": "x/z"},
            {"steps": 7},
            {"fraction": 0.5},
            {"method": Shira("wm", r=2)},
            {"method": Shira("rand", r=2, granule=4)},
            {"method": Shira("rand", r=2, part=1)},
            {"method": Lora(2)},
        )
    ]
    runs = [base.run(0.1, 0), base.run(0.3, 0), base.run(0.1, 1), *(other.run(0.1, 0) for other in others)]
    assert len({store.key(run) for run in runs}) == len(runs)
    assert store.key(Setting("x/y", Shira("rand", r=2, granule=1)).run(0.1, 0)) == store.key(runs[0])
    assert methods.Shira().describe() == {"kind": "shira"}


@pytest.fixture(scope="module")
def kept():
    """The committed results."""
    return Results()


def test_the_pages_are_what_the_results_say(kept):
    for path, text in report.pages(kept).items():
        assert path.read_text(encoding="utf-8") == text, "python -m benchmarks.quality.report writes it"
    text = report.README.read_text(encoding="utf-8")
    assert report.readme(text, kept) == text
    assert all(text.count(mark) == 1 for mark in report.MARKS)


def test_no_figure_of_the_verdict_is_typed():
    """Its figures are in tables made of the results; the prose names no measured figure."""
    template = (report.TEMPLATES / report.FIRST).read_text(encoding="utf-8")
    _, _, rest = template.partition("## Verdict")
    section, found, _ = rest.partition("## How it was measured")
    assert found
    assert section.count("{{verdict-") == len(VERDICT)
    prose = re.sub(r"`[^`]*`", "", section)
    assert re.findall(r"\S*\d\.\d\S*|\d+ (?:points|nats)|±", prose) == []


def test_the_verdict_takes_the_mask_that_validation_prefers(kept):
    mask = verdict.best_mask(kept, "digits-vit/inverted")
    scores = {one: kept.study(Setting("digits-vit/inverted", Shira(one, r=1))) for one in methods.MASKS}
    means = {one: sum(run["validation"] for run in runs) for one, runs in scores.items()}
    assert mask.mask == max(means, key=means.get)
    gain = verdict.ahead(kept, "digits-vit/inverted", mask)
    lora = kept.scores(Setting("digits-vit/inverted", Lora(1)))
    ours = [run["test"] for run in scores[mask.mask]]
    assert gain.startswith(f"{100 * (sum(ours) - sum(lora)) / len(lora):+.1f} ±")


def test_the_links_of_the_pages_lead_to_their_headings():
    def slugs(path):
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}

    pages, followed = [report.place(path) for path in report.TEMPLATES.glob("*.md")], 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for image, link in re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text):
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            assert image or (target in pages and (not heading or heading in slugs(target))), link
            followed += 1
        levels = [len(mark) for mark in re.findall(r"^(#+) ", text, flags=re.MULTILINE)]
        assert levels[0] == 1
        assert all(1 < now <= before + 1 for before, now in itertools.pairwise(levels))
    assert followed > 20


def test_the_front_is_what_the_results_say(kept):
    assert front.PATH.read_text(encoding="utf-8") == front.text(kept), "python -m benchmarks.quality.report writes it"


def test_words_are_chosen_by_the_results():
    """Ahead and behind mean by more than twice the standard error."""
    assert [sentences.word(some) for some in ([1.0, 1.2], [-1.0, -1.2], [1.0, -0.9], [0.0, 0.0], [1.0])] == [
        "ahead", "behind", "level", "level", "",
    ]  # fmt: skip
    assert [sentences.listed("abc"[:count]) for count in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_a_mean_over_tasks_has_the_error_over_the_seeds_and_that_over_the_tasks():
    by = [[0.3, 0.1], [0.6, 0.6]]
    # Half of the standard error 0.1 of the first task; and the means 0.2 and 0.6.
    assert findings.error_over_seeds(by) == pytest.approx(0.05)
    assert words.overall("smollm2", by) == "+0.400 ± 0.050 (tasks: ± 0.200)"
    assert words.overall("digits-mlp", by, between=False) == "+40.0 ± 5.0"
    assert words.overall("smollm2", [[0.3], [0.6, 0.6]]) == "+0.450 (tasks: ± 0.150)"
    assert [sentences.word_over_tasks(some) for some in (by, [[0.3, 0.1], [-0.2, -0.2]], [[0.3]], [])] == [
        "ahead", "level", "", "",
    ]  # fmt: skip


def test_who_fuses_better_is_said_by_the_seeds_that_both_have():
    a, b, c, d = ((f"x/{one}",) for one in "abcd")
    scores = {
        (a, "lora"): [-0.3, -0.31], (a, "rand"): [-0.1, -0.11, -9.0],  # the third seed is SHiRA's alone
        (b, "lora"): [-0.3, -0.1], (b, "rand"): [-0.2, -0.2],
        (c, "lora"): [-0.1], (c, "rand"): [-0.2],
        (d, "rand"): [-0.2],
    }  # fmt: skip
    told = sentences.beside_lora_fused("smollm2", [a, b, c, d], list(scores), lambda keys: scores[keys[0]])
    assert told == (
        "ahead on *a* (0.105 against 0.305; 2 seeds); level on *b* (0.200 against 0.200; 2 seeds); "
        "worse on *c* (0.200 against 0.100; 1 seed)"
    )


def test_longer_runs_are_compared_in_words(tmp_path, monkeypatch):
    ours, lora = single.longer("smollm2")
    scores = {ours: [-2.0, -2.1], lora: [-2.5, -2.6]}
    monkeypatch.setattr(Results, "longer", lambda self, one: [{"test": score} for score in scores[one]])
    assert sentences.longer_words(Results(tmp_path), "smollm2") == (
        "With 160 steps on *names* SHiRA-Rand, granule 16 is ahead of LoRA (+0.500 ± 0.000 nats; 2 seeds)."
    )
    scores[ours] = scores[lora][:1]
    assert "is beside LoRA (+0.000 nats; 1 seed)" in sentences.longer_words(Results(tmp_path), "smollm2")


def test_the_rate_that_every_seed_chooses(tmp_path):
    setting = Setting("rl/last", Lora(1))
    kept = store.Store("rl", tmp_path)
    # The first seed prefers 0.01, where the others fail; 0.02 has two seeds; 0.005 has all.
    for lr, several in {1e-2: [0.9, 0.1, 0.2], 2e-2: [0.95, 0.95], 5e-3: [0.8, 0.7, 0.9]}.items():
        for seed, one in enumerate(several):
            kept.add(setting.run(lr, seed), {"validation": one, "test": one})
    rate, runs = Results(tmp_path).steady(setting)
    assert (rate, [one["test"] for one in runs]) == (5e-3, [0.8, 0.7, 0.9])
    assert Results(tmp_path).steady(Setting("rl/last", Dora(1))) is None
    for seed, one in enumerate([0.99, 0.98, 0.97]):
        kept.add(Setting("rl/last", Shira(r=1)).run(5e-2, seed), {"validation": one, "test": one})
    assert sentences.rewards_words(Results(tmp_path), "rl") == (
        "Beside LoRA (80.0 ± 10.0), ahead is SHiRA-Rand (98.0 ± 1.0)."
    )
    told = language.steady_table(Results(tmp_path), "rl").splitlines()
    assert told[2:] == ["| SHiRA-Rand | 0.05 | 98.0 ± 1.0 | +18.0 ± 6.1 |", "| LoRA | 0.005 | 80.0 ± 10.0 |  |"]


def test_every_seed_is_trained_where_the_first_cannot_choose():
    curve = {1e-1: 0.1, 3e-2: 0.9, 1e-2: 0.2, 2e-2: 0.3, 5e-2: 0.4}
    lab = Known(lambda lr, _: curve[lr], seeds=range(3))
    single.steady_runs(lab, Setting("x/y", Shira(r=1)))
    assert {(lr, seed) for lr in (3e-2, 2e-2, 5e-2) for seed in range(3)} <= set(lab.tried)


def test_who_is_ahead_of_rand_is_said_by_the_results(tmp_path, monkeypatch):
    names = list(tasks.tasks("digits-mlp-128"))[:2]
    monkeypatch.setattr(tasks, "tasks", lambda family: dict.fromkeys(names))
    scores = {"rand": 0.5, "wm": 0.6, "snip": 0.4}

    def found(self, setting):
        kind = getattr(setting.method, "mask", "lora")
        known = type(setting.method) is Shira and kind in scores and setting.method.granule == 1
        return [scores[kind] + noise for noise in (0.0, 0.01)] if known else None

    monkeypatch.setattr(Results, "scores", found)
    monkeypatch.setattr(Results, "has", lambda self, family: True)
    families = ["digits-mlp", "digits-vit", "minilm"]
    told = sentences.default_words(Results(tmp_path), *families[:2])
    assert told.startswith(
        "Ahead of Rand in the mean over a base's tasks: SHiRA-WM on digits-mlp and digits-vit. No mask"
    )
    assert sentences.default_words(Results(tmp_path), *families).endswith("SHiRA-WM is ahead on three bases or more.")
    assert sentences.beside_rand(Results(tmp_path), "digits-mlp") == (
        "On digits-mlp, in the mean over the tasks, ahead is WM (+10.0 ± 0.0); behind is Snip (-10.0 ± 0.0)."
    )
