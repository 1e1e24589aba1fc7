"""Style transfer, tried on a model with random weights that stands for the diffusion transformer."""

from __future__ import annotations

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn", reason="pip install -e '.[test]'")
pytest.importorskip("peft", reason="pip install -e '.[test]'")
pytest.importorskip("rich", reason="pip install -e '.[test]'")

from benchmarks.quality import report
from benchmarks.quality import style as page
from benchmarks.quality.experiments import EXPERIMENTS
from benchmarks.quality.experiments import style as experiment
from benchmarks.quality.findings import Results
from benchmarks.quality.lab import Lab
from benchmarks.quality.methods import Lora, Shira
from benchmarks.quality.run import plan
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import style


def told(results):
    """The page about style."""
    return report.page((report.TEMPLATES / "style.md").read_text(encoding="utf-8"), results)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16)])


class Tiny(nn.Module):
    """Called as the diffusion transformer is, with weights of the same names: pieces of 12 x 12 by linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classes = nn.Embedding(style.CLASSES + 1, 16)
        self.into, self.out = nn.Conv2d(3, 16, 12, stride=12), nn.ConvTranspose2d(16, 3, 12, stride=12)
        self.attn1 = Attention()

    def forward(self, hidden_states, timestep, class_labels):
        x = self.into(hidden_states).permute(0, 2, 3, 1) + self.classes(class_labels)[:, None, None]
        x = x * (1 + timestep / 1000)[:, None, None, None]
        a = self.attn1
        y = x + a.to_out[0](torch.tanh(a.to_q(x)) * torch.tanh(a.to_k(x)) + a.to_v(x))
        return SimpleNamespace(sample=self.out(y.permute(0, 3, 1, 2)))


@torch.no_grad()
def one_step(model, classes, seed):
    noise = torch.randn(len(classes), 3, style.SIDE, style.SIDE, generator=torch.Generator().manual_seed(seed))
    return noise - model(noise, timestep=torch.full((len(classes),), 1000.0), class_labels=classes).sample


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(1)
    judge = style.Judge().requires_grad_(False)
    monkeypatch.setattr(style, "base", lambda: Tiny().requires_grad_(False))
    monkeypatch.setattr(style, "judge", lambda: judge)
    monkeypatch.setattr(style, "draw", one_step)
    monkeypatch.setattr(style, "photograph", lambda name: torch.linspace(0, 1, 3 * 30 * 32).view(3, 30, 32))
    monkeypatch.setattr(style, "DRAWN", {"validation": 10, "test": 20})
    monkeypatch.setattr(style, "EXAMPLES", 2)
    monkeypatch.setattr(experiment, "ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(page, "ALPHAS", (0.5, 1.0))
    monkeypatch.setattr(experiment, "BUDGET", 2)
    monkeypatch.setattr(experiment, "methods", lambda: [Shira("snip", r=2), Lora(2)])
    style.references.cache_clear()
    yield judge
    style.references.cache_clear()


def test_styles_change_what_they_name_and_nothing_else(small):
    images = style.of_class("train", 3, 6)

    def made(*styles):
        return style.rendered(images, styles, torch.Generator().manual_seed(5))

    plain, brick, fire, both = (
        made(*some) for some in style.COMBINATIONS[:1] + style.COMBINATIONS[2:0:-1] + style.COMBINATIONS[3:]
    )
    assert all(torch.equal(made(*some), made(*some)) for some in style.COMBINATIONS)
    ink = style.strokes(images, torch.Generator().manual_seed(5))
    deep, far = ink.expand_as(plain) > 0.98, style.blurred(ink, 2.0).expand_as(plain) < 0.002
    assert deep.any()
    assert far.any()
    assert (plain - brick)[deep].abs().max() < 0.02  # the same ink on another paper
    assert (plain - brick)[far].abs().mean() > 0.1
    blue = fire[:, 2:][deep[:, 2:]]
    assert blue.min() > 0.6  # the ink burns
    assert fire[:, 0][deep[:, 0]].max() < 0.3
    dusk = torch.tensor([0.75, 0.80, 0.97]).view(3, 1, 1)
    for dark, light in ((fire, plain), (both, brick)):
        assert (dark - light * dusk)[far].abs().median() < 0.01
    assert (both - fire)[deep].abs().max() < 0.05


def test_the_score_is_the_probability_of_the_digit_and_of_every_style(monkeypatch, small):
    digit, having = torch.randn(20, style.DIGITS + 1), torch.randn(20, 2)
    monkeypatch.setattr(style, "judge", lambda: lambda pictures: (pictures.flatten(1), digit, having))
    pictures = style.real((style.BLUEFIRE,), "test", 20)
    for some in style.COMBINATIONS[1:]:
        style.references.cache_clear()
        found = style.judged(pictures, some, "test")
        expected, right = [], 0
        for number in range(20):
            shares = [math.exp(one) for one in digit[number].tolist()]
            wanted = [1 / (1 + math.exp(-float(having[number, style.STYLES.index(one)]))) for one in some]
            expected.append(shares[number % 10] / sum(shares) * math.prod(wanted))
            right += max(range(11), key=shares.__getitem__) == number % 10
        assert found["score"] == pytest.approx(sum(expected) / 20)
        assert found["concept"] == right / 20
        taught = [one for number, one in enumerate(expected) if number % 10 in style.TAUGHT]
        assert found["taught"] == pytest.approx(sum(taught) / len(taught))
        assert found["score"] == pytest.approx(0.6 * found["taught"] + 0.4 * found["new"])
    style.references.cache_clear()
    assert style.judged(pictures, (style.BLUEFIRE,), "test")["distance"] == pytest.approx(0, abs=1e-9)
    style.references.cache_clear()
    assert style.judged(style.real((), "test", 20), (style.BLUEFIRE,), "test")["distance"] == pytest.approx(1)
    points = torch.tensor([[0.0], [2.0]])
    assert style.energy_distance(points, points + 3) == pytest.approx(2 * (3 + 5 + 1 + 3) / 4 - 1 - 1)


def test_spoiled_pictures_are_for_the_judge_alone():
    pytest.importorskip("skimage", reason="pip install scikit-image")
    pictures, shown, having = style.lessons(0)
    assert pictures.shape[1:] == (3, style.SIDE, style.SIDE)
    assert len(pictures) == len(shown) == len(having)
    assert 0.1 < (shown == style.NOTHING).double().mean() < 0.5
    assert set(map(tuple, having.tolist())) == set(itertools.product((0.0, 1.0), repeat=2))


def test_adapters_are_swept_alone_and_together_and_the_page_tells_it(small, monkeypatch, tmp_path):
    few = {experiment.BEST: experiment.methods(), experiment.GENTLE: [Lora(2)]}
    monkeypatch.setattr(experiment, "trainings", lambda: few)
    jobs = plan(["style"], list(EXPERIMENTS), 2)
    assert len(jobs) == 2 + 3
    lab = Lab(folder=tmp_path / "results", seeds=range(2), steps=2, cache=tmp_path / "adapters")
    for job in jobs:
        job.do(lab)
    kept = (lab.folder / "style.jsonl").read_bytes()
    done = [run["do"] for run, _ in Store("style", lab.folder)]
    assert set(done) - {"base", "weights"} == {"judge", "untouched", "train", "alphas", "sizes"}
    assert done.count("alphas") == 3 * 2 * 3
    again = Lab(folder=lab.folder, seeds=range(2), until=0, steps=2)
    for job in jobs:
        job.do(again)
    assert (lab.folder / "style.jsonl").read_bytes() == kept

    # What was kept is what two adapters on one base draw; of LoRA, the sum of both products.
    for method in experiment.methods():
        found = experiment.fused(lab, method, 1)["0.5"]
        settings = [experiment.setting(one, method) for one in experiment.styles()]
        adapters = [lab.adapter(one, lab.searched(one), 1).to_delta(Tiny()) for one in settings]
        model = Tiny()
        with torch.no_grad():
            for adapter in adapters:
                for name, entry in adapter.weights.items():
                    weight = model.get_parameter(name).view(-1)
                    if entry.nnz == entry.numel:
                        weight += 0.5 * entry.values
                    else:
                        weight[entry.indices.long()] += 0.5 * entry.values
        expected = style.drawn(model, experiment.styles())
        assert found["score"] == pytest.approx(expected["score"], rel=1e-4)

    # The size of a change, against the sum over all weights.
    for method in experiment.methods():
        found = experiment.sizes(lab, method)[1]
        changes = [experiment.setting(one, method) for one in experiment.styles()]
        adapters = [lab.adapter(one, lab.searched(one), 1).to_delta(Tiny()) for one in changes]
        whole = sum(Tiny().get_parameter(name).square().sum().item() for name in adapters[0].weights)
        added = [sum(entry.values.square().sum().item() for entry in one.weights.values()) for one in adapters]
        assert found["norm"] == pytest.approx([(one / whole) ** 0.5 for one in added], rel=1e-3)
        assert all(1 <= one <= (2.01 if isinstance(method, Lora) else 16) for one in found["rank"])
    assert experiment.stable_rank(torch.diag(torch.tensor([3.0, 3.0, 0.0]))) == pytest.approx(2)

    text = told(Results(lab.folder, seeds=2))
    assert "Not yet run" not in text
    assert "{{" not in text
    assert text.count("| SHiRA-Snip |") >= 7
    assert "nan" not in text
    assert "| SHiRA" not in told(Results(tmp_path))


def test_the_kept_results_fill_the_whole_section():
    text = told(Results())
    assert text.startswith("# Style transfer")
    assert "Not yet run" not in text
    assert "{{" not in text
    for name in re.findall(r"\]\((.+?\.png)\)", text):
        assert (page.PICTURES / name).exists()
    # A score of the page is the mean of what was kept.
    runs = [result["1"]["score"] for run, result in Store("style") if run["do"] == "alphas" and run["with"]
            and run["method"] == Lora(2).describe() and run["lrs"] == [0.01, 0.01]]  # fmt: skip
    assert len(runs) == 3
    assert f"| {100 * sum(runs) / 3:.1f} ±" in text.partition("## Two styles at once")[2].partition("| LoRA ")[2][:60]


def test_drawing_follows_the_flow_of_the_class_beyond_that_of_none():
    """A flow that is the same at all times ends at its picture; guidance goes twice as far from the one of no class."""
    pytest.importorskip("diffusers", reason="pip install diffusers")
    shape = (3, style.SIDE, style.SIDE)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))

    def model(pictures, timestep, class_labels):
        assert class_labels.tolist() == [4, 2, style.NO_CLASS, style.NO_CLASS]
        ends = torch.tensor([0.3, 0.6, 0.1, 0.1])[:, None, None, None]
        return SimpleNamespace(sample=noise.repeat(2, 1, 1, 1) - ends)

    drawn = style.draw(model, torch.tensor([4, 2]), 7)
    for picture, end in zip(drawn, (0.1 + 2 * (0.3 - 0.1), 0.1 + 2 * (0.6 - 0.1)), strict=True):
        assert torch.allclose(picture, torch.full(shape, ((end + 1) / 2)).clamp(0, 1), atol=1e-5)
