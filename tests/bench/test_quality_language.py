"""The language tasks of the experiments: their texts, splits and scores. Models here are tiny and untrained."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("rich")
from benchmarks.quality.tasks import corpus, gpt, minilm


def assert_no_leak(documents, splits):
    """The rows of a document are in one split, and no row, however often it occurs, is in two splits."""
    kept = {split: set(rows) for split, rows in splits.items()}
    assert all(kept.values())
    assert sum(map(len, kept.values())) == len(set().union(*kept.values()))
    for name, rows in documents.items():
        # Rows that an earlier document has too are in its split; all others stay together.
        shared = {row for other, others in documents.items() if other != name for row in others}
        own = set(rows) - shared
        assert sum(bool(own & members) for members in kept.values()) <= 1, name


def test_documents_stay_together_and_no_row_is_in_two_splits():
    documents = {
        f"{kind}{n}": [(f"{kind} {n} {i}", kind) for i in range(10 + n)] + [("licence", kind)]
        for kind in "ab"
        for n in range(20)
    }
    splits = corpus.divided(documents, kind=lambda row: row[1])
    assert_no_leak(documents, splits)
    assert sum(map(len, splits.values())) == len({row for rows in documents.values() for row in rows})
    for split, share in corpus.SPLITS.items():
        for kind in "ab":
            count = sum(row[1] == kind for row in splits[split])
            assert count == pytest.approx(share * 391, abs=30)
    # Neither the order of the documents nor the content of one moves another to a different split.
    assert corpus.divided(dict(reversed(list(documents.items()))), kind=lambda row: row[1]) == splits


def test_a_text_with_two_labels_is_kept_once():
    documents = {f"{n}": [("x in y", ("for", "if")[n % 2]), (f"{n}", "for")] for n in range(9)}
    splits = corpus.divided(documents, same=lambda row: row[0])
    assert [text for rows in splits.values() for text, _ in rows].count("x in y") == 1
    assert sum(map(len, splits.values())) == 10


def test_characters_are_the_same_text_on_every_python():
    assert corpus.provenance(gpt.texts("characters").values())["sha256"] == "11924edbe24ed449"


@pytest.mark.parametrize("kind", ["keywords", "spelling", "order"])
def test_classification_is_balanced_and_its_splits_share_nothing(kind):
    documents, rows = minilm.DOCUMENTS[kind](), minilm.rows(kind)
    assert_no_leak(documents, rows)
    texts = {split: {text for text, _ in members} for split, members in rows.items()}
    assert not texts["test"] & texts["train"]
    assert not texts["validation"] & texts["train"]
    for split, count in minilm.COUNTS.items():
        classes = [label for _, label in rows[split]]
        assert len(rows[split]) == count
        assert {classes.count(label) for label in minilm.labels(kind)} == {count // len(minilm.labels(kind))}


@pytest.mark.parametrize("kind", gpt.KINDS)
def test_no_piece_of_a_text_is_in_two_splits(kind):
    documents = gpt.documents(kind)
    assert_no_leak(documents, corpus.divided(documents))
    assert all(len(gpt.data(kind, split)) > 20_000 for split in corpus.SPLITS)


class Table(nn.Module):
    """Predicts the next byte from the last one, and is called like a language model."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)

    def forward(self, input_ids, use_cache):
        class Output:
            logits = self.table(input_ids)

        return Output


def test_gpt_scores_minus_the_mean_loss_of_a_byte():
    torch.manual_seed(0)
    model, task = Table(), gpt.Text("gpt-s", "characters")
    windows = gpt.held_out("characters", "validation")
    assert windows.shape == (gpt.HELD_OUT["validation"], gpt.WINDOW + 1)
    losses = F.cross_entropy(model.table(windows[:, :-1]).transpose(1, 2), windows[:, 1:], reduction="none")
    assert task.score(model, "validation") == pytest.approx(-losses.mean().item(), rel=1e-6)
    with torch.no_grad():
        model.table.weight.zero_()
    assert task.score(model) == pytest.approx(-math.log(256), rel=1e-6)


def test_gpt_batches_are_of_the_seed_and_of_the_first_fraction():
    task = gpt.Text("gpt-s", "headers")
    first, again, other = (torch.stack(list(task.batches(seed, 3))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    text = gpt.data("headers", "train")
    beginning = bytes(text[: round(0.01 * len(text))].tolist())
    for batch in task.batches(0, 3, fraction=0.01):
        assert all(bytes(window.tolist()) in beginning for window in batch)


def test_pretraining_goes_on_with_the_same_bits(monkeypatch, tmp_path):
    monkeypatch.setattr(gpt, "CACHE", tmp_path)
    monkeypatch.setattr(gpt, "SAVED_EVERY", 2)
    whole = gpt.make(8)
    gpt.pretrain(whole, "tiny", 5)
    assert not list(tmp_path.iterdir())

    seen, loss_of = [], gpt.loss_of

    def interrupted(model, batch):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(batch)
        return loss_of(model, batch)

    monkeypatch.setattr(gpt, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpt.pretrain(gpt.make(8), "tiny", 5)
    monkeypatch.setattr(gpt, "loss_of", loss_of)
    resumed = gpt.make(8)
    gpt.pretrain(resumed, "tiny", 5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


class Bag(nn.Module):
    """A body for a `Classifier`: an embedding of each token, and nothing else."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, minilm.WIDTH)

    def forward(self, input_ids, attention_mask):
        class Output:
            last_hidden_state = self.table(input_ids)

        return Output


@pytest.fixture
def bag(monkeypatch):
    """A classifier over letters, so that no real model's tokenizer is needed."""

    class Letters:
        def encode(self, text, truncation, max_length):
            return [min(ord(letter), 299) for letter in text][:max_length]

    monkeypatch.setattr(minilm, "_tokenizer", Letters)
    monkeypatch.setattr(minilm, "DOCUMENTS", {"keywords": minilm.keywords})
    minilm.examples.cache_clear()
    minilm.ordered.cache_clear()
    torch.manual_seed(0)
    yield minilm.Classifier(Bag(), {"keywords": 4})
    minilm.examples.cache_clear()
    minilm.ordered.cache_clear()


def test_half_of_the_sentences_have_two_letters_swapped_within_a_word(monkeypatch):
    said = [f"write number {n} into every buffer" for n in range(200)]
    monkeypatch.setattr(corpus, "library", lambda: {"module.py": '"""' + ". ".join(said) + '."""'})
    (rows,) = minilm.spelling.__wrapped__().values()
    assert len(rows) == len(said)
    assert 80 < sum(label == "right" for _, label in rows) < 120
    for straight, (text, label) in zip(said, rows, strict=True):
        changed = [(a, b) for a, b in zip(straight.split(), text.split(), strict=True) if a != b]
        assert len(changed) == (label == "wrong")
        for before, after in changed:
            at = [one for one in range(len(before)) if before[one] != after[one]]
            assert at == [at[0], at[0] + 1]
            assert 0 < at[0] < len(before) - 2
            assert sorted(before) == sorted(after)


def test_heads_are_fitted_alone_and_tell_more_than_chance(bag):
    task, body = minilm.Classification("keywords"), bag.body.table.weight.detach().clone()
    minilm.fit_heads(bag)
    assert torch.equal(bag.body.table.weight, body)
    assert task.score(bag, "validation") > 0.4  # chance would give a quarter
    # The scores are those of single texts, however they are padded.
    tokens, classes = minilm.examples("keywords", "test")
    right = 0
    for one, label in zip(tokens, classes, strict=True):
        x = bag.body.table(torch.tensor(one)).mean(0)
        right += int(bag.heads["keywords"](x).argmax() == label)
    assert task.score(bag) == pytest.approx(right / len(tokens), abs=1.5 / len(tokens))


def test_classification_batches_are_of_the_seed_and_of_the_first_fraction(bag):
    task = minilm.Classification("keywords")
    first, again, other = ([labels for *_, labels in task.batches(seed, 80)] for seed in (0, 0, 1))
    assert len(first) == 80
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    tokens, _ = minilm.examples("keywords", "train")
    few = {tuple(one) for one in tokens[:120]}
    for ids, there, _ in task.batches(0, 20, fraction=0.1):
        assert {tuple(row[: there[at].sum()].tolist()) for at, row in enumerate(ids)} <= few
    loss = task.loss(bag, next(task.batches(0, 1)))
    loss.backward()
    assert bag.heads["keywords"].weight.grad.abs().sum() > 0
