"""The texts show the figures that were measured, and a run that got worse is noticed."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich", reason="pip install -e '.[bench]'")
pytest.importorskip("matplotlib", reason="pip install -e '.[bench]'")
from benchmarks.speed import plots, record, results, scaling, suite, summary, texts

COMMITTED = results.FOLDER / f"{results.COMMITTED}.json"


def case(line: str, median: float, variant: str = "", threads: int = 1) -> dict[str, Any]:
    one = {"line": line, "variant": variant, "median": median, "low": median, "high": median, "best": median}
    info = {"threads": threads, "quick": False, "results": [one], "seconds": {}}
    return {"name": "bench_it[1thread]", "extra_info": info, "stats": {"data": [1.0]}, "fullname": "/a/path"}


def run(*cases: dict[str, Any]) -> dict[str, Any]:
    cpu = {"brand_raw": "A processor", "family": 1, "model": 2, "flags": ["sse"], "count": 2}
    return {"machine_info": {"node": "host", "python_version": "3.11.7", "cpu": cpu, "torch": "2.13.0"},
            "commit_info": {}, "benchmarks": list(cases)}  # fmt: skip


FASTER, SMALLER = (
    "swap_ over stock bf16",
    "training over LoRA",
)  # its target is a least value; its target is a largest value


def test_trimming_keeps_what_was_measured_and_not_where() -> None:
    raw = run(case(FASTER, 2.0), {"name": "bench_nothing", "extra_info": {}})
    kept = results.trim(raw)
    assert kept["machine_info"] == {
        "python": "3.11.7",
        "cpu": {"brand_raw": "A processor", "family": 1, "model": 2, "count": 2},
        "torch": "2.13.0",
    }
    assert kept["benchmarks"] == [{"name": "bench_it[1thread]", "extra_info": raw["benchmarks"][0]["extra_info"]}]
    assert results.trim(kept) == kept


def test_quick_runs_and_empty_runs_are_not_recorded() -> None:
    quick = run(case(FASTER, 2.0))
    quick["benchmarks"][0]["extra_info"]["quick"] = True
    with pytest.raises(ValueError, match="--quick"):
        results.trim(quick)
    with pytest.raises(ValueError, match="no benchmark"):
        results.trim(run())


@pytest.mark.parametrize(
    ("line", "before", "now", "worse"),
    [
        (FASTER, 2.0, 1.70, False),  # 1.18 times as bad
        (FASTER, 2.0, 1.65, True),  # 1.21
        (FASTER, 2.0, 4.0, False),
        (SMALLER, 1.0, 1.18, False),
        (SMALLER, 1.0, 1.22, True),
        (SMALLER, 1.0, 0.5, False),
        ("call", 2.0, 9.0, False),  # microseconds: another machine's, or another day's
        ("limit, copy", 30.0, 3.0, False),
        ("swap_ over ways bf16", 30.0, 3.0, False),  # the time of another way, which is not guarded
        ("a line that is gone", 2.0, 1.0, False),
    ],
)
def test_a_ratio_that_is_20_percent_worse_is_flagged(line: str, before: float, now: float, worse: bool) -> None:
    found = results.compare(run(case(line, before)), run(case(line, now)))
    assert [one.key for one in found.worse] == ([(line, "", 1)] if worse else [])
    if worse:
        assert found.worse[0].factor == pytest.approx(max(before / now, now / before))
        assert summary.LINES[line].text in str(found.worse[0])


def test_disturbed_rounds_are_no_regression() -> None:
    before, now = run(case(FASTER, 2.0)), run(case(FASTER, 1.0))
    assert len(results.compare(before, now).worse) == 1
    now["benchmarks"][0]["extra_info"]["results"][0]["best"] = 1.9
    assert not results.compare(before, now).worse


def test_variants_and_threads_are_compared_each_with_its_own() -> None:
    before = run(case(FASTER, 2.0), case(FASTER, 4.0, threads=2), case(FASTER, 9.0, "other"))
    now = run(case(FASTER, 2.0), case(FASTER, 2.0, threads=2))
    found = results.compare(before, now)
    assert [one.key for one in found.worse] == [(FASTER, "", 2)]
    assert found.compared == 2
    assert found.missing == [(FASTER, "other", 1)]
    with pytest.raises(ValueError, match="measured twice"):
        results.compare(before, run(case(FASTER, 2.0), case(FASTER, 2.0)))


def test_the_command_fails_where_something_got_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    latest = tmp_path / "latest.json"
    latest.write_text(json.dumps(run(case(FASTER, 2.0), case(SMALLER, 1.0))))
    monkeypatch.setattr(sys, "argv", ["record.py", "--latest", str(latest), "--name", "mine"])
    assert record.main() == 0
    assert "/a/path" not in (tmp_path / "mine.json").read_text()
    monkeypatch.setattr(sys, "argv", ["results.py", "compare", "--latest", str(latest), "--name", "mine"])
    assert results.main() == 0
    latest.write_text(json.dumps(run(case(FASTER, 1.0), case(SMALLER, 1.05))))
    assert results.main() == 1
    said = capsys.readouterr().out
    assert "worse: swap_ 1 % bf16, over the best of plain torch (1 thread): 1, was 2: 2.00 times as bad" in said
    assert "2 ratios compared: 1 worse by more than 20%, 1 within 10 % of what they were" in said


def test_two_runs_agree_or_it_is_said_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = run(case(FASTER, 2.0), case(SMALLER, 1.0), case("call", 2.0), case("refuse over fuse_ bf16", 1.0))
    two = run(case(FASTER, 1.5), case(SMALLER, 1.09), case("call", 9.0), case("refuse over fuse_ bf16", 1.0))
    two["benchmarks"][0]["extra_info"]["results"][0]["low"] = 1.2
    said, count = results.agree(one, two)
    assert count == 3  # microseconds are not a ratio
    assert said == [
        " 33% apart: swap_ 1 % bf16, over the best of plain torch (1 thread): 2 (2 to 2) and 1.5 (1.2 to 1.5); "
        "the rounds themselves lie wide"
    ]
    latest, again = tmp_path / "latest.json", tmp_path / "again.json"
    latest.write_text(json.dumps(one))
    command = ["results.py", "agree", "--latest", str(latest), "--again", str(again)]
    for other, status, last in ((two, 1, "2 of 3 ratios agree within 10%"), (one, 0, "3 of 3 ratios agree")):
        again.write_text(json.dumps(other))
        monkeypatch.setattr(sys, "argv", command)
        assert results.main() == status
        assert last in capsys.readouterr().out.splitlines()[-1]

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    again.write_text(json.dumps(two))
    record.record(latest, "mine", again)
    kept = results.figures(results.read(tmp_path / "mine.json"))
    assert kept[FASTER, "", 1]["again"] == 1.5
    assert "again" not in kept["call", "", 1]


def test_it_is_said_where_others_had_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(case(FASTER, 2.0), case(SMALLER, 1.0), case(FASTER, 2.0, threads=2))
    for one, share in zip(found["benchmarks"], (0.99, 0.5, 0.5), strict=True):
        one["extra_info"]["on_cpu"] = share
    console = summary.Console(width=150, record=True)
    summary.show(found["benchmarks"], console)
    assert "other processes had the processor: 1 benchmark" in console.export_text()
    for name in ("latest", "again"):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    command = ["results.py", "agree", *(f"--{name}={tmp_path / name}.json" for name in ("latest", "again"))]
    monkeypatch.setattr(sys, "argv", command)
    assert results.main() == 0
    assert "again.json: other processes had the processor in 1 of 3 benchmarks" in capsys.readouterr().out


def test_a_wide_figure_stands_with_where_it_lies() -> None:
    found = run(case(FASTER, 2.0), case("swap_ over stock fp32", 2.0), case("swap_ over fuse bf16", 2.0))
    wide, narrow, apart = (one["extra_info"]["results"][0] for one in found["benchmarks"])
    wide |= {"low": 1.7, "high": 2.1}
    narrow |= {"low": 1.9, "high": 2.1}
    apart["again"] = 2.3
    f = texts.Figures(results.trim(found))
    assert f(FASTER) == "2.0x (1.70 to 2.1)"
    assert f("swap_ over stock fp32") == "2.0x"
    assert f("swap_ over fuse bf16") == "2.0x (2.0 to 2.3)"
    rows = [row.split(" | ") for row in texts.everything(f).splitlines()[2:]]
    assert [row[-1].startswith("~") for row in rows] == [True, False, True]
    assert results.distance(0.0, 1.0) == results.distance(-1.0, 1.0) == float("inf")


BENCH = """
import pathlib
def test_it(benchmark):
    ran = pathlib.Path(__file__).with_suffix(".ran")
    ran.write_text(ran.read_text() + "x" if ran.exists() else "x")
    assert {condition}
    benchmark.extra_info["it"] = "{name}"
    benchmark.pedantic(int)
"""


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytest_benchmark")
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)  # pytest-benchmark turns itself off under xdist
    files = [tmp_path / f"test_{name}.py" for name in ("one", "two")]
    fixed = tmp_path / "fixed"
    for file, condition in zip(files, ("True", f"pathlib.Path({str(fixed)!r}).exists()"), strict=True):
        file.write_text(BENCH.format(condition=condition, name=file.stem))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # their imports are most of the time
    out, arguments = tmp_path / "latest.json", ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin"]

    def times() -> list[int]:
        return [len(file.with_suffix(".ran").read_text()) for file in files]

    assert not suite.run(files, out, arguments)
    assert not out.exists()
    assert "[2/2] test_two: FAILED" in capsys.readouterr().out
    fixed.touch()
    assert suite.run(files, out, arguments)
    assert "[1/2] test_one: already done" in capsys.readouterr().out
    assert times() == [1, 2]
    found = json.loads(out.read_text())
    assert [one["extra_info"]["it"] for one in found["benchmarks"]] == ["test_one", "test_two"]
    assert not list(tmp_path.glob("*.parts"))
    assert suite.stamp(["a"]) != suite.stamp(["b"])


def test_the_texts_are_those_of_the_committed_results() -> None:
    assert texts.stale(results.read(COMMITTED)) == [], "python -m benchmarks.speed.record --texts writes them"


def test_another_figure_makes_the_texts_stale() -> None:
    found = results.read(COMMITTED)
    changed = copy.deepcopy(found)
    for one in changed["benchmarks"]:
        for result in one["extra_info"]["results"]:
            result["median"] *= 1.3 if result["line"] == "swap_ over best LoRA bf16" else 1
    assert texts.stale(changed) == ["README.md", "docs/speed.md"]


def test_part_of_a_run_makes_no_text_and_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    latest = tmp_path / "latest.json"
    latest.write_text(json.dumps(run(case(FASTER, 2.0))))
    before = texts.README.read_text()
    with pytest.raises(ValueError, match=r"the results have no '.*' with 1 thread"):
        record.record(latest, results.COMMITTED)
    assert texts.README.read_text() == before
    assert not (tmp_path / f"{results.COMMITTED}.json").exists()


def test_a_run_without_a_benchmark_that_the_page_shows_is_not_complete() -> None:
    """The HTML page of such a run is only the table of what was measured."""
    found = results.read(COMMITTED)
    names = dict.fromkeys(one["name"].partition("[")[0] for one in found["benchmarks"])
    assert texts.complete(texts.Figures(found))
    for name in names:
        rest = [one for one in found["benchmarks"] if one["name"].partition("[")[0] != name]
        f = texts.Figures({**found, "benchmarks": rest})
        try:
            texts.page(f)
        except (ValueError, KeyError):
            assert not texts.complete(f), name


def test_the_readme_has_its_markers_once() -> None:
    readme = texts.README.read_text()
    with pytest.raises(ValueError, match=re.escape(texts.BEGIN)):
        texts.section(readme.replace(texts.BEGIN, ""))
    with pytest.raises(ValueError, match=re.escape(texts.END)):
        texts.section(readme + texts.END)


@pytest.mark.parametrize(
    ("value", "text"), [(0.968, "0.97"), (1.996, "2.0"), (3.678, "3.7"), (9.96, "10"), (43.6, "44"), (240.2, "240")]
)
def test_figures_have_the_digits_that_their_spread_supports(value: float, text: str) -> None:
    assert texts.short(value) == text


def test_the_plot_is_that_of_the_committed_results() -> None:
    image = pytest.importorskip("PIL.Image")
    assert texts.PLOT.stat().st_size < 100_000
    with image.open(texts.PLOT) as picture:
        assert picture.text["Source"] == plots.digest(results.read(COMMITTED))


@pytest.mark.skipif(importlib.util.find_spec("typer") is None, reason="pip install -e '.[bench]'")
def test_a_page_from_results_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from shira.cli import app

    monkeypatch.chdir(results.FOLDER.parent.parent)
    done = CliRunner().invoke(app, ["bench", "--report", str(tmp_path), "--from", str(COMMITTED)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert {"ways.png", "ratios.png", "limits.png", "roofline.png", "scaling.png", "fig7.png"} <= plots
    assert page.count("data:image/png;base64,") == len(plots)
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)  # nothing is fetched
    assert "How the cost grows" in page
    for arguments in (["--from", str(COMMITTED)], ["--report", str(tmp_path), "--from", str(COMMITTED), "-k", "x"]):
        assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 1


def test_the_front_of_quality_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    quality = tmp_path / "quality.json"
    point = {"name": "Rand", "task": "digits", "accuracy": 0.8, "switch_seconds": 1e-3, "file_bytes": 30_000}
    found = run(case(FASTER, 2.0))
    assert "front.png" not in [path.name for path in plots.draw(found, tmp_path, quality).values()]
    quality.write_text(json.dumps({"front": [point, {**point, "name": "LoRA", "accuracy": 0.7}]}))
    assert "front.png" in [path.name for path in plots.draw(found, tmp_path, quality).values()]


def made_up(rng: np.random.Generator, density: float, side: int, cost: scaling.Model) -> dict[str, Any]:
    work = scaling.Work.random(side * side, 2, density)
    work = scaling.Work(work.lines, work.weight_lines, work.streamed * rng.uniform(0.5, 2), work.entries)
    return {
        "lines": work.lines,
        "weight_bytes": 64 * work.weight_lines,
        "streamed": work.streamed,
        "entries": work.entries,
        "seconds": {"median": cost.seconds(work)},
    }


def test_the_cost_model_finds_the_costs_of_made_up_points() -> None:
    rng = np.random.default_rng(0)
    cost = scaling.Model(2e-6, 8e-9, 3e-9, 5e-11, 0, 0, 0)
    points = [made_up(rng, d, side, cost) for d in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3) for side in (512, 2048, 8192)]
    model = scaling.fit(points)
    for term in scaling.TERMS:
        assert getattr(model, term) == pytest.approx(getattr(cost, term), rel=1e-6, abs=1e-15)  # none below zero
    assert model.largest < 1e-6
    assert model.bandwidth("scattered") == pytest.approx(16e9)
    assert [model.in_runs(scaling.Work.random(1 << 20, 2, density)) for density in (0.01, 0.1)] == [False, True]

    fuse = scaling.Model(1e-5, 8e-9, 3e-9, 5e-11, 2e-9, 0, 0)
    other = scaling.fit([made_up(rng, density, 4096, fuse) for density in (0.01, 0.02, 0.08)], model)
    assert (other.calls, other.entries, other.scattered) == pytest.approx((1e-5, 2e-9, 8e-9), rel=1e-5)


def test_a_point_that_the_model_misses_shows() -> None:
    rng = np.random.default_rng(0)
    cost = scaling.Model(0, 8e-9, 0, 0, 0, 0, 0)
    points = [made_up(rng, density, 4096, cost) for density in (0.001, 0.002, 0.004, 0.008, 0.01)]
    points[2]["seconds"]["median"] *= 2
    assert scaling.fit(points).largest > 0.3


def test_random_work_is_that_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    numel = 1 << 20
    for itemsize, density in ((2, 0.01), (4, 0.05)):
        touched = np.unique(rng.choice(numel, int(density * numel), replace=False) // (64 // itemsize))
        assert scaling.Work.random(numel, itemsize, density).lines == pytest.approx(len(touched), rel=0.01)
