"""Sentences of the page that say who is ahead. Their words are chosen by the results: *ahead* and *behind* mean that a
mean difference is more than twice its standard error, *level* that it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.quality import tasks
from benchmarks.quality.experiments import dora, single, trials
from benchmarks.quality.findings import Fused, Results, error_over_seeds, gains, mean, standard_error
from benchmarks.quality.lab import COSTLY, Setting
from benchmarks.quality.language import FORGOTTEN, beside_all, forgotten
from benchmarks.quality.methods import LATER, MASKS, Lora, Method, Shira
from benchmarks.quality.verdict import preferred
from benchmarks.quality.words import NAMES, difference, label, number, overall, spread, what

WORDS = ("ahead", "behind", "level")


def word(differences: Sequence[float]) -> str:
    """Which of the `WORDS`; "" where there are fewer than two differences."""
    return said(mean(differences), standard_error(differences)) if len(differences) > 1 else ""


def said(by: float, error: float) -> str:
    return "ahead" if by > 2 * error else "behind" if by < -2 * error else "level"


def word_over_tasks(by: Sequence[Sequence[float]]) -> str:
    """The same of the mean over tasks; "" where there are none, or a task has fewer than two differences."""
    error = error_over_seeds(by) if by else None
    return "" if error is None else said(mean(map(mean, by)), error)


def listed(some: Iterable[str]) -> str:
    found = list(some)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}" if found else ""


def against_lora(results: Results, family: str, method: Method) -> dict[str, list[float]]:
    """For each task by how much a method is ahead of LoRA, for the seeds that both have."""
    found = {}
    for name in tasks.tasks(family):
        ours, lora = (results.scores(Setting(name, one)) for one in (method, Lora(single.rank(family))))
        if ours and lora:
            found[name] = gains(ours, lora)
    return found


def beside_lora(results: Results, family: str) -> str:
    """One line for every method that was run on every task: on which it is ahead of LoRA, level, behind."""
    lines = []
    for method in single.methods(family):
        by = {} if isinstance(method, Lora) and method.kind == "lora" else against_lora(results, family, method)
        if len(by) < len(tasks.tasks(family)):
            continue
        told = [
            f"{one} on {listed(f'*{what(name)}*' for name in names)}"
            for one in WORDS
            if (names := [name for name, some in by.items() if word(some) == one])
        ]
        few = [f"*{what(name)}* ({difference(family, some)})" for name, some in by.items() if len(some) < 2]
        told += [f"one seed on {listed(few)}"] if few else []
        told.append(f"over all tasks {overall(family, list(by.values()))}")
        lines.append(f"- {label(method)}: {'; '.join(told)}.")
    return "\n".join(lines)


def forgotten_words(results: Results, family: str) -> str:
    """What random granules forget beside LoRA, in words."""
    ours, lora = Shira("rand", r=single.rank(family), granule=16), Lora(single.rank(family))
    sentences = []
    for which, text in (("docs", "language reference"), ("chat", "model's own earlier answers")):
        told: dict[str, list[str]] = {}
        for name in tasks.tasks(family):
            runs, theirs = (results.study(Setting(name, one)) for one in (ours, lora))
            if runs and theirs:
                # Less forgotten is better.
                found = word(gains([-one[which] for one in runs], [-one[which] for one in theirs]))
                told.setdefault({"ahead": "less", "behind": "more", "level": "as much"}.get(found, ""), []).append(name)
        parts = [
            f"{one} on {listed(f'*{what(n)}*' for n in told[one])}"
            for one in ("less", "more", "as much")
            if one in told
        ]
        if parts:
            sentences.append(f"of the {text} {'; '.join(parts)}")
    return f"Beside LoRA, {label(ours)} forgets {'; and '.join(sentences)}." if sentences else ""


def refined_words(results: Results, family: str) -> str:
    """By how much SHiRA is ahead of LoRA where the rates of both were searched in half steps too."""
    r, told = single.rank(family), []
    for method in single.close(r):
        by = []
        for name in tasks.tasks(family):
            found = [results.refined(Setting(name, one)) for one in (method, Lora(r))]
            by += [gains(*([run["test"] for run in some or ()] for some in found))] if all(found) else []
        if method != Lora(r) and len(by) == len(tasks.tasks(family)):
            told.append(f"{label(method)} {overall(family, by)}")
    return f"With rates searched in half steps, ahead of LoRA by: {'; '.join(told)}." if told else ""


def together_words(results: Results, *families: str) -> str:
    """By how much each method is ahead of LoRA over all tasks of several families."""
    found = {
        label(method): beside_all(results, method, *families)
        for method in single.methods(families[-1])
        if method != Lora(single.rank(families[0]))
    }
    told = [f"{name} {by}" for name, by in found.items() if by]
    count = sum(len(tasks.tasks(family)) for family in families)
    return f"Over all {count} tasks, ahead of LoRA by: {'; '.join(told)}." if told else ""


def matched_words(results: Results, family: str) -> str:
    """What is forgotten where as much was learned as with LoRA, in the mean over the tasks, and by how much less that
    is than LoRA forgets there."""
    names, lora = list(tasks.tasks(family)), Lora(single.rank(family))
    theirs = [results.matched(Setting(name, lora), Setting(name, lora)) for name in names]
    told = []
    for method in single.close(single.rank(family)):
        found = [results.matched(Setting(name, method), Setting(name, lora)) for name in names]
        rises = [forgotten(results, name, one[1]) for name, one in zip(names, found, strict=True) if one]
        if len(rises) < len(names) or not all(theirs):
            continue
        text = " and ".join(f"{mean(some):+.2f}" for some in zip(*rises, strict=True))
        if method != lora:
            less = [
                overall(family, [
                    gains([-run[which] for run in ours[1]], [-run[which] for run in other[1]])
                    for ours, other in zip(found, theirs, strict=True)
                    if ours and other
                ], between=False)
                for which in FORGOTTEN
            ]  # fmt: skip
            text += f" (less than LoRA by {' and '.join(one.removeprefix('+') for one in less)})"
        told.append(f"{label(method)} {text}")
    return f"{'; '.join(told)}." if len(told) > 1 else ""


def default_words(results: Results, *families: str) -> str:
    """Which masks are ahead of Rand on which bases, and whether one is on most of them."""
    found: dict[str, list[str]] = {}
    tried: dict[str, int] = {}
    for family in filter(results.has, families):
        r = single.rank(family)
        several: list[Method] = [Shira(mask, r=r) for mask in (*MASKS[1:], *LATER)]
        several += trials.methods(family) if family not in COSTLY else []
        for method in several:
            found_there = word_over_tasks(against_rand(results, family, method))
            if found_there:
                tried[label(method)] = tried.get(label(method), 0) + 1
            if found_there == "ahead":
                found.setdefault(label(method), []).append(family)
    if not tried:
        return ""
    ahead = [f"{name} on {listed(some)}" for name, some in found.items()]
    most = [name for name, some in found.items() if len(some) >= 3]
    told = f"Ahead of Rand in the mean over a base's tasks: {'; '.join(ahead) or 'none'}."
    enough = listed(most) + (" are" if len(most) > 1 else " is") if most else "No mask is"
    return f"{told} {enough} ahead on three bases or more."


def beside_rand(results: Results, family: str) -> str:
    """Which masks are ahead of Rand, level with it and behind it, in the mean over the tasks."""
    told: dict[str, list[str]] = {}
    for mask in (*MASKS[1:], *LATER):
        by = against_rand(results, family, Shira(mask, r=single.rank(family)))
        if found := word_over_tasks(by):
            told.setdefault(found, []).append(f"{NAMES[mask]} ({overall(family, by, between=False)})")
    parts = [f"{one} {'are' if len(told[one]) > 1 else 'is'} {listed(told[one])}" for one in WORDS if one in told]
    return f"On {family}, in the mean over the tasks, {'; '.join(parts)}." if parts else ""


def dora_words(results: Results, family: str) -> str:
    """On which tasks a DoRA behind a mask is ahead of the mask's entries themselves."""
    lines = []
    for mask in ("rand", "wm"):
        told: dict[str, list[str]] = {}
        for name, method in dora.chosen(family):
            ours, plain = (results.scores(Setting(name, one)) for one in (method, Shira(mask, r=method.r)))
            if method.mask == mask and ours and plain and (found := word(gains(ours, plain))):
                told.setdefault(found, []).append(f"*{what(name)}*")
        if told:
            parts = [f"{one} on {listed(told[one])}" for one in WORDS if one in told]
            lines.append(f"with {NAMES[mask]} it is {'; '.join(parts)}")
    return f"On {family}, beside the same entries trained themselves, {', and '.join(lines)}." if lines else ""


def against_rand(results: Results, family: str, method: Method) -> list[list[float]]:
    """By how much a mask is ahead of Rand on each task; nothing unless it was run on every one."""
    rand, by = Shira("rand", r=single.rank(family)), []
    for name in tasks.tasks(family):
        ours, theirs = (results.scores(Setting(name, one)) for one in (method, rand))
        if not ours or not theirs:
            return []
        by.append(gains(ours, theirs))
    return by


def rewards_words(results: Results, family: str) -> str:
    """Every method beside LoRA on what was learned from rewards, at the rates that all seeds choose."""
    lora, lines = Lora(single.rank(family)), []
    for name in tasks.tasks(family):
        found = {method: results.steady(Setting(name, method)) for method in single.methods(family)}
        scores = {method: [run["test"] for run in one[1]] for method, one in found.items() if one}
        told: dict[str, list[str]] = {}
        for method in scores if lora in scores else ():
            if method != lora:
                text = f"{label(method)} ({spread(family, scores[method])})"
                told.setdefault(word(gains(scores[method], scores[lora])), []).append(text)
        parts = [f"{one} {'are' if len(told[one]) > 1 else 'is'} {listed(told[one])}" for one in WORDS if one in told]
        lines += [f"Beside LoRA ({spread(family, scores[lora])}), {'; '.join(parts)}."] if parts else []
    return " ".join(lines)


Group = tuple[str, ...]


def fused_words(results: Results, family: str) -> str:
    """Whose fused adapters score higher, LoRA's or SHiRA's, at the strength and the rate that validation prefers."""
    fused = Fused(results, family)

    def scores(keys: Sequence[tuple[Group, str]]) -> list[float]:
        best = preferred(fused, keys)
        return [mean(run["together"]["sum"][fused.alpha(best)]["test"]) for run in fused.runs[best]]

    told = beside_lora_fused(family, fused.groups(), list(fused.runs), scores)
    return f"On {family}, with all adapters on, SHiRA is {told}." if told else ""


def own_words(results: Results, family: str) -> str:
    """The same where every adapter has a strength of its own."""
    fused = Fused(results, family)

    def scores(keys: Sequence[tuple[Group, str]]) -> list[float]:
        found = [fused.balanced[key] for key in keys]
        best = max(found, key=lambda runs: (len(runs), mean(mean(run["validation"]) for run in runs)))
        return [mean(run["test"]) for run in best]

    told = beside_lora_fused(family, fused.groups(), list(fused.balanced), scores)
    return f"With a strength for each adapter, SHiRA is {told}." if told else ""


def beside_lora_fused(
    family: str,
    groups: Iterable[Group],
    keys: Sequence[tuple[Group, str]],
    scores: Callable[[Sequence[tuple[Group, str]]], list[float]],
) -> str:
    """On which groups of tasks SHiRA's adapters are ahead of LoRA's; ``scores`` has one for each seed."""
    told: dict[str, list[str]] = {}
    for group in groups:
        lora, ours = (
            [key for key in keys if key[0] == group and key[1].startswith("lora") is one] for one in (True, False)
        )
        if lora and ours:
            by = gains(scores(ours), scores(lora))
            both = " against ".join(number(family, mean(scores(some)[: len(by)])) for some in (ours, lora))
            text = f"*{' + '.join(map(what, group))}* ({both}; {len(by)} seed{'s' * (len(by) > 1)})"
            told.setdefault(word(by) or ("better" if by[0] > 0 else "worse"), []).append(text)
    return "; ".join(f"{one} on {listed(told[one])}" for one in (*WORDS, "better", "worse") if one in told)


def longer_words(results: Results, family: str) -> str:
    """Who is ahead with four times the steps, of the two methods that were run so."""
    ours, lora = single.longer(family)
    scores = [results.longer(one) for one in (ours, lora)]
    if not all(scores):
        return ""
    by = gains(*([one["test"] for one in some or ()] for some in scores))
    seeds = f"{len(by)} seed{'s' * (len(by) > 1)}"
    beside = {"ahead": "ahead of", "behind": "behind", "level": "level with"}.get(word(by), "beside")
    return (
        f"With {ours.steps} steps on *{what(ours.task)}* {label(ours.method)} is {beside} LoRA "
        f"({difference(family, by)} nats; {seeds})."
    )


SENTENCES: dict[str, Callable[..., str]] = {
    "beside-lora": beside_lora,
    "forgotten-words": forgotten_words,
    "matched-words": matched_words,
    "refined-words": refined_words,
    "together-words": together_words,
    "default": default_words,
    "fused-words": fused_words,
    "own-words": own_words,
    "longer-words": longer_words,
    "beside-rand": beside_rand,
    "dora-words": dora_words,
    "rewards": rewards_words,
}
