"""The texts about the committed results: the README's section about speed, and docs/speed.md.

No figure is typed: the prose stands in templates/, the figures come from the results. record.py writes the texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed import results, scaling, summary

ROOT = Path(__file__).parent.parent.parent
README, PAGE, PLOT = ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.png"
BEGIN, END = "<!-- speed: benchmarks/speed/texts.py writes from here -->", "<!-- speed: to here -->"
STEPS = ("load", "fuse", "unfuse", "unload")
MICROARCHITECTURES = {("AMD EPYC", 25, 17): "Zen 4"}  # where the brand does not name it


def short(value: float) -> str:
    """Two or three digits, as many as the spread of the rounds supports."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.995 else f"{value:.2f}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: list[str], body: Iterable[list[str]]) -> str:
    return "\n".join([row(head), row("---" for _ in head), *map(row, body)])


def fill(template: str, **parts: str) -> str:
    """The prose of a template, with its figures and tables filled in."""
    return (Path(__file__).parent / "templates" / f"{template}.md").read_text().format(**parts)


class Figures:
    """The results of one file, by line, variant and threads. A call gives the text of a median."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.all = results.figures(found)
        self.machine = found["machine_info"]
        self.benchmarks = found["benchmarks"]

    def median(self, line: str, variant: str = "", threads: int = 1) -> float:
        try:
            return float(self.all[line, variant, threads]["median"])
        except KeyError:
            raise ValueError(
                f"the results have no {line!r}, {variant!r} with {threads} thread{'s' * (threads > 1)}"
            ) from None

    def __call__(self, line: str, variant: str = "", threads: int = 1) -> str:
        """The median, with its range where that is wide."""
        text = short(self.median(line, variant, threads)) + summary.LINES[line].unit
        result = self.all[line, variant, threads]
        if not results.is_wide(result):
            return text
        low, high = map(short, results.reach(result))
        return f"{text} ({low} to {high})"

    def only(self, line: str) -> str:
        """Of a line that is measured in one case, whose name depends on the sizes of the run."""
        variants = self.variants(line)
        return self(line, variants[0] if len(variants) == 1 else "")

    def both(self, line: str) -> list[str]:
        """The texts of bf16 and of fp32."""
        return [self(f"{line} bf16"), self(f"{line} fp32")]

    def variants(self, line: str) -> list[str]:
        return list(dict.fromkeys(variant for found, variant, _ in self.all if found == line))

    def info(self, start: str) -> list[dict[str, Any]]:
        """The extra_info of the benchmarks whose names begin with this."""
        return [one["extra_info"] for one in self.benchmarks if one["name"].startswith(start)]

    @property
    def processor(self) -> str:
        cpu = self.machine["cpu"]
        name = MICROARCHITECTURES.get((cpu["brand_raw"], cpu.get("family"), cpu.get("model")))
        return cpu["brand_raw"] + (f" ({name})" if name else "")


def switching(f: Figures) -> dict[str, list[str]]:
    """The rows about switching, by a short name: how many times as long the other way takes."""
    peft = [f.only(f"switcher over PEFT {word}") for word in ("SHiRA", "LoRA")]
    loads = [f("load", f"bf16, {which} adapter") for which in ("first", "later")]
    return {
        "fuse": ["`swap_` over the fastest LoRA fuse", *f.both("swap_ over best LoRA")],
        "granules": ["the same with granules of 32 entries", f.only("granule 32 over fuse bf16"), ""],
        "exact": ["`swap_` over the fastest other way that keeps the base", *f.both("swap_ over best exact")],
        "lossy": ["`swap_` over the fastest way that gives up the base's bits", *f.both("swap_ over best lossy")],
        "touch": ["`swap_`, share of touch", *f.both("swap_ of touch")],
        "switch": ["`switch_` to the next adapter, over revert and `apply_`", *f.both("switch_ over two")],
        "switcher": [
            "`Switcher.activate` A to B, over LoRA unfuse and fuse (`addmm_`)",
            f.only("switcher over addmm_"),
            "",
        ],
        "peft": [
            "`Switcher.activate` A to B, over PEFT's unmerge and merge: SHiRA / LoRA",
            " / ".join(peft),
            "",
        ],
        "load": [
            "load a file and switch it on, over PEFT SHiRA's load and merge: first / later adapter",
            " / ".join(loads),
            "",
        ],
    }


def learning(f: Figures) -> dict[str, list[str]]:
    """The rows about training."""

    def share(word: str) -> str:
        time, memory = f(f"training over {word}", "llama bf16"), f(f"training memory over {word}", "llama bf16")
        return f"{time} / {memory}".replace("x", "")

    gradient = [f(f"sampled_grad {dtype}", "512 tokens") for dtype in ("bf16", "fp32")]
    steps = {word: [f"the same, share of PEFT {word}'s", share(word), ""] for word in ("DoRA", "SHiRA", "Super-Tuning")}
    return {
        "gradient": ["`sampled_grad`, 512 tokens, over the dense gradient and a gather", *gradient],
        "stock": ["`adamw_` over fused AdamW on the values, a cast and a write-back", *f.both("adamw_ over stock")],
        "dense": ["`adamw_` over a masked dense AdamW, the paper's own way", *f.both("adamw_ over dense")],
        "select": ["`select_top` over `abs().topk()`", *f.both("select_top magnitude")],
        "LoRA": [
            "a step of a Llama (2 layers, 2048 wide, 128 tokens), share of PEFT LoRA's time / peak memory",
            share("LoRA"),
            "",
        ],
        **steps,
    }


README_ROWS = (
    "fuse",
    "granules",
    "exact",
    "touch",
    "switch",
    "peft",
    "load",
    "gradient",
    "dense",
    "select",
    "LoRA",
    "SHiRA",
)


def readme(f: Figures) -> str:
    """The section between the markers, with a few of the rows that docs/speed.md begins with."""
    rows = switching(f) | learning(f)
    return fill(
        "readme",
        processor=f.processor,
        torch=f.machine["torch"],
        table=table(["", "bfloat16", "float32"], [rows[name] for name in README_ROWS]),
        fuse_touches=f("fuse_ in touches bf16").replace("x", ""),
        fuse_over_add=f("fuse_ over scatter_add_ bf16"),
    )


# docs/speed.md


def limits(f: Figures) -> str:
    threads = sorted({n for line, _, n in f.all if line.startswith("limit, ")})
    lines = [line for line in summary.LINES if line.startswith("limit, ")]
    return table(
        ["limit", *(f"{n} thread{'s' * (n > 1)}" for n in threads)],
        [
            [line.removeprefix("limit, "), *(f"{f.median(line, '', n):.3g}{summary.LINES[line].unit}" for n in threads)]
            for line in lines
        ],
    )


def ways(f: Figures) -> str:
    infos = {info["dtype"]: info for info in f.info("bench_ways[1thread")}
    names = [name for name in infos["bf16"]["seconds"] if name not in ("swap_", "PEFT LoRA", "PEFT SHiRA")]
    body = [["`swap_`", *(duration(infos[d]["seconds"]["swap_"]["median"]) for d in ("bf16", "fp32")), "", ""]]
    for name in sorted(names, key=lambda one: infos["bf16"]["seconds"][one]["median"]):
        if ("swap_ over ways bf16", name, 1) not in f.all:
            continue
        body.append(
            [
                name if name.startswith("PEFT") else f"`{name}`",
                *(duration(infos[d]["seconds"][name]["median"]) for d in ("bf16", "fp32")),
                *(f(f"swap_ over ways {d}", name) for d in ("bf16", "fp32")),
            ]
        )
    return table(["a layer of 4096 x 4096", "bf16", "fp32", "over `swap_`, bf16", "fp32"], body)


def loads(f: Figures) -> str:
    (info,) = f.info("bench_loads[1thread")
    body = [["shira", duration(info["seconds"]["shira"]["median"] / info["layers"]), "", megabytes(info, "shira")]]
    for name in f.variants("load over ways"):
        seconds = info["seconds"][name]["median"] / info["layers"]
        body.append(
            [name.replace("addmm_", "`addmm_`"), duration(seconds), f("load over ways", name), megabytes(info, name)]
        )
    return table(["from a file, switched on, a layer", "bf16", "over shira", "file"], body)


def megabytes(info: dict[str, Any], name: str) -> str:
    size = info["file_bytes"].get(name)
    return f"{size / 1e6:.2f} MB" if size else ""


def fig7(f: Figures) -> str:
    lines = {"the paper's pair": "fig. 7, the paper's pair", "the fast pair": "fig. 7, the fast pair"}
    places: dict[tuple[str, str, str], dict[str, str]] = {}
    for variant in f.variants(lines["the paper's pair"]):
        side, *rest = variant.split(", ")
        places.setdefault(tuple(rest), {})[side] = variant  # type: ignore[index]
    sides = sorted({side for found in places.values() for side in found}, key=int)
    body = []
    for (dtype, rank, density), found in places.items():
        for name, line in lines.items():
            cells = [f(line, found[side]) if side in found else "" for side in sides]
            body.append([name, dtype, rank, density.replace("%", " %"), *cells])
    return table(["fuse over switch", "dtype", "rank", "density", *sides], body)


def end_to_end(f: Figures) -> str:
    body = []
    for info in f.info("bench_end_to_end[1thread"):
        parts, of = info["share"]
        for way in dict.fromkeys(name.partition(": ")[0] for name in info["seconds"]):
            seconds = info["seconds"]
            steps = [seconds[f"{way}: {step}"]["median"] * of / parts for step in STEPS]
            total = seconds[way]["median"] * of / parts
            ratio = total / (seconds["shira"]["median"] * of / parts)
            body.append(
                [
                    f"{info['model']}, {parts}/{of}",
                    way,
                    *map(duration, steps),
                    duration(total),
                    "" if way == "shira" else f"{short(ratio)}x",
                ]
            )
    return table(
        ["model, share measured", "way", "load", "fuse", "unfuse", "unload", "load + fuse", "over shira"], body
    )


def training(f: Figures) -> str:
    body = []
    for info in f.info("bench_training[1thread"):
        lora, memory = info["seconds"]["PEFT LoRA"]["median"], info["peak_bytes"]
        for way, peak in memory.items():
            rate = 1 / info["seconds"][way]["median"]
            body.append(
                [
                    f"{info['model']} {info['dtype']}",
                    way,
                    f"{peak / 1e9:.2f} GB",
                    "" if way == "PEFT LoRA" else f"{100 * (peak / memory['PEFT LoRA'] - 1):+.0f} %",
                    f"{rate:.2f}",
                    "" if way == "PEFT LoRA" else f"{100 * (rate * lora - 1):+.0f} %",
                ]
            )
    return table(["model", "adapter", "peak", "of LoRA's", "steps/s", "of LoRA's"], body)


def models(f: Figures, op: str = "swap_") -> dict[int, scaling.Model]:
    """The fitted cost for each number of threads; for fuse_ with swap_'s cost of memory."""
    points: dict[int, list[dict[str, Any]]] = {}
    for info in f.info("bench_scaling["):
        if info["op"] == op:
            points.setdefault(info["threads"], []).extend(info["points"])
    memory = models(f) if op != "swap_" else {}
    return {threads: scaling.fit(found, memory.get(threads)) for threads, found in sorted(points.items())}


def cost(f: Figures) -> str:
    body = []
    for op in ("swap_", "fuse_"):
        for threads, model in models(f, op).items():
            bandwidths = [model.bandwidth(term) / 1e9 for term in ("scattered", "runs", "streamed")]
            body.append(
                [
                    f"`{op}`",
                    str(threads),
                    duration(model.calls),
                    *(f"{one:.3g} GB/s" if one < 1000 else "nothing more" for one in bandwidths),
                    f"{1e9 * model.entries:.2g} ns",
                    f"{model.typical:.0%} / {model.largest:.0%}",
                ]
            )
    terms = ["a call", "scattered lines", "lines in runs", "streamed bytes", "an entry"]
    return table(["op", "threads", *terms, "typical / largest error"], body)


def llama_shapes(wide: int, grouped: int, inner: int, layers: int) -> list[tuple[int, int]]:
    """q, k, v, up and down of every layer."""
    return [(wide, wide), (grouped, wide), (grouped, wide), (inner, wide), (wide, inner)] * layers


PREDICTED = {
    "LLaMA2-7B": llama_shapes(4096, 4096, 11008, 32),
    "LLaMA2-13B": llama_shapes(5120, 5120, 13824, 40),
    "LLaMA2-70B": llama_shapes(8192, 1024, 28672, 80),
}


def said(model: scaling.Model, shapes: Iterable[Iterable[int]]) -> float:
    """Seconds to switch a random 1 % of weights of these shapes on, in bf16."""
    return sum(model.seconds(scaling.Work.random(math.prod(shape), 2, 0.01)) for shape in shapes)


def predictions(f: Figures) -> str:
    fitted = models(f)
    body = []
    for name, shapes in PREDICTED.items():
        entries = sum(m * n for m, n in shapes) / 100
        body.append([name, f"{entries / 1e6:.0f} M", *(duration(said(model, shapes)) for model in fitted.values())])
    return table(["bf16, 1 %", "entries", *(f"{n} thread{'s' * (n > 1)}" for n in fitted)], body)


def measured_beside(f: Figures) -> str:
    """The cost that was fitted to single calls on square weights, beside whole models that it was not fitted to."""
    one = models(f)[1]
    body = []
    for info in f.info("bench_end_to_end[1thread"):
        parts, of = info["share"]
        sum_of, there = said(one, info["shapes"]), info["seconds"]["shira: fuse"]["median"]
        body.append([f"{info['model']}, {parts}/{of}", duration(sum_of), duration(there), f"{short(there / sum_of)}x"])
    return table(["`Switcher.activate`, 1 thread", "the sum says", "measured", "of it"], body)


def everything(f: Figures) -> str:
    threads = sorted({n for *_, n in f.all})
    order = list(summary.LINES)
    # Old results may have lines that are no longer measured.
    known = dict.fromkeys((line, variant) for line, variant, _ in f.all if line in summary.LINES)
    keys = sorted(known, key=lambda key: order.index(key[0]))
    body = []
    for line, variant in keys:
        cells = []
        for n in threads:
            one = f.all.get((line, variant, n))
            wide = one is not None and results.is_ratio((line, variant, n)) and results.is_wide(one)
            cells.append(f"{'~ ' * wide}{results.told(one)}" if one else "")
        kind = summary.LINES[line]
        body.append([kind.text, variant, kind.unit.strip(), kind.goal(), *cells])
    return table(["what", "case", "unit", "wanted", *(f"{n} thread{'s' * (n > 1)}" for n in threads)], body)


def page(f: Figures) -> str:
    def rates(line: str) -> str:
        every = [result["median"] for (found, _, threads), result in f.all.items() if found == line and threads == 1]
        return f"{min(every):.1f} to {max(every):.1f}"

    own = 100 * f.median("training, bound", "llama bf16, of shira's")
    return fill(
        "page",
        switching=table(["switching", "bfloat16", "float32"], switching(f).values()),
        learning=table(["training", "bfloat16", "float32"], learning(f).values()),
        bound=f"{own:.0f}",
        fuse_touches=f("fuse_ in touches bf16").replace("x", ""),
        fuse_over_add=f("fuse_ over scatter_add_ bf16"),
        call=f("call", "torch.ops.shira.swap_"),
        inference_call=f("call, inference tensors", "torch.ops.shira.swap_"),
        encode=rates("encode"),
        decode=rates("decode"),
        committed=results.COMMITTED,
        processor=f.processor,
        torch=f.machine["torch"],
        limits=limits(f),
        ways=ways(f),
        warm_bf16=f("warm swap_ over best exact bf16", "512 x 512"),
        warm_fp32=f("warm swap_ over best exact fp32", "512 x 512"),
        warm_lora_bf16=f("warm swap_ over fuse bf16", "512 x 512"),
        warm_lora_fp32=f("warm swap_ over fuse fp32", "512 x 512"),
        loads=loads(f),
        fig7=fig7(f),
        end_to_end=end_to_end(f),
        training=training(f),
        cost=cost(f),
        beside=measured_beside(f),
        predictions=predictions(f),
        everything=everything(f),
    )


SHOWN = (
    *("limits", "swap", "granule", "exchange", "ways", "warm", "loads", "load", "switcher", "switcher_over_peft"),
    *("sampled_grad", "adamw", "dense", "select_top", "training", "fuse", "call", "encode", "decode"),
    *("fig7", "end_to_end", "scaling"),
)
"""The benchmarks whose figures the page needs."""


def complete(f: Figures) -> bool:
    """Whether the run has all that the page shows."""
    return all(f.info(f"bench_{name}[") for name in SHOWN)


def section(text: str) -> str:
    """The text between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must have one {BEGIN} and one {END}")
    return text.partition(f"{BEGIN}\n")[2].partition(END)[0]


def made(f: Figures) -> dict[Path, str]:
    """The files about these results, and their texts."""
    text = README.read_text()
    section(text)  # refuses a README without the markers
    before, after = text.partition(f"{BEGIN}\n")[0], text.partition(END)[2]
    return {README: f"{before}{BEGIN}\n{readme(f)}{END}{after}", PAGE: page(f)}


def stale(found: dict[str, Any]) -> list[str]:
    """Which of the texts do not say what the results say."""
    wanted = made(Figures(found))
    return [
        str(path.relative_to(ROOT)) for path, text in wanted.items() if not path.exists() or path.read_text() != text
    ]
