"""shira.Trainer: a plain loop's bits, and the same bits after stopping and going on, whatever has a state."""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from shira import SGD, AdamW, SparseTuner, Trainer, masks
from tuning import bits, same_bits


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augments with all three global sources of chance."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((8,), float(index)) + torch.randn(8) + random.random() + float(np.random.rand())  # noqa: NPY002
        return x, x[:2].sin()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x).float(), y)


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002
    random.seed(value)


def make(scaled: bool = False, shuffled_by: int | None = None, kind: Any = AdamW, **options: Any) -> Trainer:
    """A trainer with everything that has a state; every call gives the same one."""
    model = network()
    tuner = SparseTuner(model, masks.Rand(density=0.3), r"^0$", whole=r"^4\.")
    optimizer = kind(tuner, lr=1e-2)
    generator = None if shuffled_by is None else torch.Generator().manual_seed(shuffled_by)
    options = {
        "data": DataLoader(Noisy(), 2, shuffle=True, generator=generator),
        "loss": loss_of,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "accumulate": 2,
        "clip": 1.0,
        "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3) if scaled else None,
        "evaluation": DataLoader(Noisy(), 4, shuffle=True),
        "evaluate_every": 2,
        "progress": False,
        **options,
    }
    return Trainer(tuner, options.pop("data"), **options)


def flat(*states: Any) -> list[Any]:
    """What dicts, lists and tuples hold, in one list."""
    found: list[Any] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                walk(part[key])
        elif isinstance(part, (list, tuple)):
            for inner in part:
                walk(inner)
        else:
            found.append(part)

    walk(states)
    return found


def everything(trainer: Trainer) -> list[Any]:
    """The whole state of a run, and the next random numbers, as one flat list."""
    return flat(
        trainer.optimizer.state_dict(),
        trainer.scheduler.state_dict() if trainer.scheduler else None,
        trainer.scaler.state_dict() if trainer.scaler else None,
        bits(trainer.tuner.model),
        trainer.evaluations,
        [trainer.step, trainer.epoch, trainer._position],
        [torch.rand(3), np.random.rand(), random.random()],  # noqa: NPY002
    )


def same(one: list[Any], two: list[Any]) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


# 6 batches and 3 steps per epoch: in the middle of one, at its end, and at the start of the next.
@pytest.mark.parametrize("half", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("scaled", [False, True])
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path: Path, half: int, scaled: bool) -> None:
    shuffled_by = 5 if half % 2 else None
    seed(1)
    wanted = everything(make(scaled, shuffled_by).fit(steps=9))
    seed(1)
    make(scaled, shuffled_by, checkpoint=tmp_path / "run.pt", checkpoint_every=half).fit(steps=half)
    seed(99)  # whatever happens meanwhile
    torch.rand(7)
    trainer = make(scaled, shuffled_by, evaluation=DataLoader(Noisy(), 4, shuffle=True)).resume(tmp_path / "run.pt")
    assert trainer.step == half
    same(everything(trainer.fit(steps=9)), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # no temporary file is left


def test_a_trainer_says_how_far_it_is() -> None:
    trainer = make()
    trainer.fit(3)
    tuner = trainer.tuner
    assert repr(trainer) == f"Trainer({tuner!r}, AdamW, step 3, epoch {trainer.epoch})"


def test_two_fits_are_one() -> None:
    seed(1)
    wanted = everything(make().fit(steps=5))
    seed(1)
    same(everything(make().fit(steps=2).fit(steps=5)), wanted)
    seed(1)
    by_epochs = make().fit(epochs=1)
    assert (by_epochs.step, by_epochs.epoch) == (3, 1)
    assert by_epochs.fit(epochs=2).step == 6


def test_resume_with_workers_and_other_optimizers(tmp_path: Path) -> None:
    def run(**options: Any) -> Trainer:
        loader = DataLoader(Noisy(), 2, shuffle=True, num_workers=1)
        return make(kind=lambda tuner, lr: SGD(tuner, lr, momentum=0.9), data=loader, evaluation=None, **options)

    seed(1)
    wanted = everything(run().fit(steps=5))
    seed(1)
    run(checkpoint=tmp_path / "run.pt").fit(steps=2)
    same(everything(run().resume(tmp_path / "run.pt").fit(steps=5)), wanted)


def test_the_steps_are_those_of_a_plain_loop() -> None:
    data = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(5)]
    results = []
    for ours in (True, False):
        model = network()
        tuner = SparseTuner(model, masks.Rand(density=0.3), r"^0$|^4$")
        optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-2)
        torch.manual_seed(3)
        if ours:
            Trainer(
                tuner, data, loss=loss_of, optimizer=optimizer, accumulate=2, clip=0.5, autocast=torch.bfloat16,
                progress=False,
            ).fit(epochs=2)  # fmt: skip
        else:
            model.train()
            model[1].eval()
            for group in (data[:2], data[2:4], data[4:]) * 2:
                for batch in group:
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = loss_of(model, batch) / len(group)
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(tuner.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        results.append(bits(model))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values(), strict=True))


def test_statistics_of_the_base_stay_and_detach_restores_it() -> None:
    model = network()
    before = bits(model)
    with SparseTuner(model, masks.Rand(density=0.3)) as tuner:
        Trainer(tuner, [(torch.randn(4, 8) + 3, torch.randn(4, 2))], loss=loss_of, progress=False).fit(steps=3)
        assert model.training
        assert not same_bits(model, before)
    assert same_bits(model, before)


def test_a_compiled_model_trains() -> None:
    data = [(torch.randn(4, 8), torch.randn(4, 2))]
    results = []
    for compiled in (True, False):
        model = network()
        model[3].p = 0.0
        tuner = SparseTuner(model, masks.Rand(density=0.3))
        called = torch.compile(model, backend="aot_eager") if compiled else model
        Trainer(tuner, data, loss=loss_of, model=called, progress=False).fit(steps=4)
        results.append(model[0].weight.detach().clone())
    torch.testing.assert_close(*results)


def test_callbacks_stop_and_evaluation_changes_nothing() -> None:
    seen = []

    def watch(trainer: Trainer) -> bool:
        seen.append(trainer.step)
        return trainer.step == 3

    seed(1)
    trainer = make(callbacks=[watch]).fit(steps=50)
    assert seen == [1, 2, 3]
    assert trainer.evaluations
    assert [step for step, _ in trainer.evaluations] == [2]
    model = trainer.tuner.model
    modes, before, chance = [m.training for m in model.modules()], bits(model), torch.get_rng_state()
    batch = torch.ones(2, 8), torch.zeros(2, 2)
    given = trainer.evaluate([batch])
    assert modes == [m.training for m in model.modules()]
    assert given == loss_of(model.eval(), batch).item()
    model.train()
    model[1].eval()
    assert same_bits(model, before)
    assert torch.equal(chance, torch.get_rng_state())


def test_progress_as_text_and_as_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make(progress=True, log_every=2).fit(steps=4)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert all("loss 0." in line or "loss " in line for line in lines)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich sees it
    make(progress=True, log_every=2).fit(steps=4)
    captured = capsys.readouterr()
    assert "4/4" in captured.err
    assert "loss" in captured.err
    assert not captured.out


def test_default_loss_is_the_models_own() -> None:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.layer(x).square().mean()}

    tuner = SparseTuner(WithLoss(), masks.Rand(density=0.5))
    trainer = Trainer(tuner, [{"x": torch.ones(2, 4)}], progress=False)
    before = trainer.evaluate([{"x": torch.ones(2, 4)}])
    trainer.fit(steps=3)
    assert trainer.loss < before
    with pytest.raises(ValueError, match=r"a batch must be .*, got int; for any other give loss="):
        Trainer(tuner, [1], progress=False).fit(steps=1)
    with pytest.raises(ValueError, match="data must be batches, as a list or a DataLoader, got int"):
        Trainer(tuner, 1, progress=False)  # type: ignore[arg-type]
    tuner = SparseTuner(network(), masks.Rand(density=0.5))
    with pytest.raises(ValueError, match=r"the loss must be a scalar tensor, got shape \[2, 2\]"):
        Trainer(tuner, [{"input": torch.ones(2, 8)}], progress=False).fit(steps=1)


def test_distributed_samplers_hear_of_the_epoch(tmp_path: Path) -> None:
    data = TensorDataset(torch.arange(8.0)[:, None].expand(8, 8).contiguous(), torch.zeros(8, 2))
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
    make(data=DataLoader(data, 2, sampler=sampler), accumulate=1).fit(epochs=3)
    assert sampler.epoch == 2


# Refusals


def test_checkpoints_of_others_are_refused_and_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    make(checkpoint=path).fit(steps=2)

    def refused(trainer: Trainer, says: str) -> None:
        before = bits(trainer.tuner.model)
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=says) as error:
            trainer.resume(path)
        assert "run.pt" in str(error.value)
        assert same_bits(trainer.tuner.model, before)
        assert torch.equal(state, torch.get_rng_state())
        assert (trainer.step, trainer.epoch, trainer._position, trainer._batches) == (0, 0, 0, None)
        assert trainer.optimizer.state_dict()["state"] == {}

    def of(model: nn.Module, mask: Any, **options: Any) -> Trainer:
        tuner = SparseTuner(model, mask, r"^0$", **{"whole": r"^4\.", **options})
        optimizer = AdamW(tuner)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return Trainer(tuner, [1], optimizer=optimizer, scheduler=scheduler)

    refused(of(network(), masks.Rand(density=0.3, seed=1)), r"0\.weight has other entries \(another mask\)")
    refused(of(network(), masks.Rand(density=0.1)), r"0\.weight has other entries")
    refused(of(network(), masks.Rand(density=0.5, granule=2)), r"0\.weight has another granule")
    refused(of(network(), masks.Rand(density=0.3), whole=None), r"has 4\.bias, 4\.weight")
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    refused(of(other, masks.Rand(density=0.3)), r"0\.weight has another base")
    refused(make(scaled=True), "has none for a scaler, this trainer has one")
    refused(make(scheduler=None), "has one for a scheduler, this trainer has none")
    refused(make(kind=SGD), "optimizer is AdamW, this one is SGD")
    wider = network()
    wider.register_buffer("more", torch.zeros(1))
    refused(of(wider, masks.Rand(density=0.3)), "other buffers")
    refused(make(data=DataLoader(Noisy(), 11)), "4 batches into an epoch, the data has only 1")
    refused(make(shuffled_by=3), "the checkpoint has 0 generators of data, here are 1")
    trainer = make()
    trainer.optimizer = AdamW([{"params": [p]} for p in trainer.tuner.parameters()])
    refused(trainer, "different number of parameter groups")


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    make(checkpoint=path).fit(steps=1)
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"nonsense" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.pt: this is not a whole checkpoint"):
            make().resume(path)
    torch.save({"version": 2}, path)
    with pytest.raises(ValueError, match=r"not a checkpoint of shira\.Trainer, version 1"):
        make().resume(path)
    with pytest.raises(FileNotFoundError):
        make().resume(tmp_path / "nothing.pt")


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.pt"
    trainer = make(checkpoint=path).fit(steps=1)
    before = path.read_bytes()

    def full(state: Any, name: Path) -> None:
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_what_cannot_train_is_said() -> None:
    tuner = SparseTuner(network(), masks.Rand(density=0.3))

    def once() -> Iterator[int]:
        yield 1

    for options, says in (
        ({"data": once()}, "iterable more than once, got the iterator generator"),
        ({"accumulate": 0}, "at least 1, got 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"optimizer": AdamW(list(tuner.parameters())[:1])}, "must train every one of tuner.parameters"),
    ):
        with pytest.raises(ValueError, match=says):
            Trainer(tuner, options.pop("data", [1]), **options)
    trainer = Trainer(tuner, [], loss=loss_of, progress=False)
    with pytest.raises(ValueError, match="steps or epochs"):
        trainer.fit()
    with pytest.raises(ValueError, match="data gave no batch"):
        trainer.fit(steps=1)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="no batch to evaluate on"):
        trainer.evaluate([])
    bad = [(torch.full((2, 8), float("nan")), torch.zeros(2, 2))]
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        Trainer(tuner, bad, loss=loss_of, progress=False, log_every=1).fit(steps=3)


# Interrupts


def test_an_interrupted_fit_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """Ctrl-C at calls all over the run: the next `fit` gives the same bits, or asks for `resume`, which gives them."""

    def run(shuffled_by: int | None) -> Trainer:
        seed(1)
        return make(True, shuffled_by, evaluation=None, evaluate_every=0)

    calls, stepping = 0, list[bool]()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += 1
        stepping.append(trainer._stepping)
        if calls == at:
            sys.setprofile(None)
            raise KeyboardInterrupt

    at = 0
    # What runs once in a process has run then.
    wanted = {shuffled_by: everything(run(shuffled_by).fit(steps=3)) for shuffled_by in (5, None)}
    trainer = run(5)
    sys.setprofile(count)
    trainer.fit(steps=3)
    sys.setprofile(None)
    chosen = random.Random(0)
    inside, outside = ([i for i in range(50, calls - 50) if stepping[i] is half] for half in (True, False))
    several = [at for pair in zip(chosen.sample(inside, 4), chosen.sample(outside, 4), strict=True) for at in pair]
    chosen.shuffle(several)
    halves = 0
    for turn, at in enumerate(several):  # noqa: B007 - the hook reads it
        shuffled_by = 5 if turn % 2 else None
        trainer, path = run(shuffled_by), tmp_path / "run.pt"
        trainer.save(path)
        calls = 0
        sys.setprofile(count)
        try:
            with suppress(KeyboardInterrupt):
                trainer.fit(steps=3)
        finally:
            sys.setprofile(None)
            torch.set_grad_enabled(True)  # torch's no_grad, interrupted as it ends, leaves it off
        if trainer._stepping:
            halves += 1
            for refused in (
                lambda trainer=trainer: trainer.fit(steps=3),
                lambda trainer=trainer: trainer.save("no.pt"),
            ):
                with pytest.raises(RuntimeError, match=r"half a step: .* go back to a checkpoint with resume\(\)"):
                    refused()
            trainer.resume(path)
        same(everything(trainer.fit(steps=3)), wanted[shuffled_by])
    assert 0 < halves < len(several)


def test_an_error_of_the_loss_or_the_data_is_no_lost_step() -> None:
    fails = {"loss": 5, "data": 9}

    class Failing(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            fails["data"] -= 1
            if fails["data"] == 0:
                raise OSError("the share is away")
            return super().__getitem__(index)

    def failing(model: nn.Module, batch: Any) -> Tensor:
        fails["loss"] -= 1
        if fails["loss"] == 0:
            raise MemoryError
        return loss_of(model, batch)

    seed(1)
    wanted = everything(make(evaluation=None, evaluate_every=0).fit(steps=4))
    seed(1)
    trainer = make(data=DataLoader(Failing(), 2, shuffle=True), loss=failing, evaluation=None, evaluate_every=0)
    for error in (OSError, MemoryError):
        with pytest.raises(error):
            trainer.fit(steps=4)
        assert all(p.grad is None for p in trainer.tuner.parameters())
    same(everything(trainer.fit(steps=4)), wanted)


# Broken checkpoints


def paths(state: Any, limit: int = 8) -> Iterator[tuple[Any, ...]]:
    """The way to every part of a state; of long lists, to some."""
    inner = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for at, (key, part) in enumerate(inner):
        if at < limit or isinstance(state, dict):
            yield (key,)
            yield from ((key, *rest) for rest in paths(part, limit))


def faulty(state: Any, path: tuple[Any, ...], fault: Any) -> Any:
    """The state with one part taken out, or something else in its place."""
    key, *rest = path
    items = dict(state) if isinstance(state, dict) else dict(enumerate(state))
    if rest:
        items[key] = faulty(items[key], tuple(rest), fault)
    elif fault is KeyError:
        del items[key]
    else:
        items[key] = fault
    return items if isinstance(state, dict) else type(state)(items.values())


FAULTS = [
    KeyError, None, "x", -1, 3, 0.5, True, [], {}, [1, 2], {"a": 1}, torch.zeros(3), torch.zeros(()),
    torch.ones(2, 2).int(),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["cosine", "chained", "plateau"])
def test_a_broken_checkpoint_is_refused_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """One part after the other is broken: what is refused has changed nothing, and what is taken can train."""

    def build() -> Trainer:
        trainer = make(True, 5)
        lr = torch.optim.lr_scheduler
        if kind == "chained":
            parts = [lr.MultiStepLR(trainer.optimizer, [2, 4]), lr.LambdaLR(trainer.optimizer, lambda step: 0.9**step)]
            trainer.scheduler = lr.SequentialLR(trainer.optimizer, parts, milestones=[2])
        elif kind == "plateau":

            class Plateau(lr.ReduceLROnPlateau):
                def step(self) -> None:  # type: ignore[override]
                    super().step(1.0)

            trainer.scheduler = Plateau(trainer.optimizer, patience=0)
        return trainer

    good, mine = tmp_path / "good.pt", tmp_path / "mine.pt"
    seed(1)
    build().fit(steps=4).save(good)
    seed(2)
    trainer = build().fit(steps=2)
    trainer.save(mine)
    state, chance = torch.load(good, weights_only=True), random.Random(kind)
    all_paths = list(paths(state))
    before = flat(trainer._state(), bits(trainer.tuner.model))
    taken = []
    for path in chance.sample(all_paths, 35):
        fault = chance.choice(FAULTS)
        broken = (
            faulty(state, path, fault) if fault is not KeyError or isinstance(part(state, path[:-1]), dict) else None
        )
        if broken is None:
            continue
        batches, copied = trainer._batches, copy.deepcopy(broken)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *args, new=copied, **options: new)
            try:
                trainer.resume(good)
            except ValueError as error:
                refused = str(error)
            else:
                refused = None
        if refused is None:
            taken.append((path, fault))
            trainer.fit(steps=trainer.step + 1)
            trainer.resume(mine)
            same(flat(trainer._state(), bits(trainer.tuner.model)), before)
            continue
        same(flat(trainer._state(), bits(trainer.tuner.model)), before)
        assert trainer._batches is batches
    assert len(taken) < 20, taken
    found = everything(trainer.fit(steps=6))
    seed(2)
    same(found, everything(build().fit(steps=6)))


def part(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


def test_a_part_that_raises_as_it_is_taken_is_put_back(tmp_path: Path) -> None:
    """A scheduler of somebody's own, which refuses in its own way, last of all."""

    class Own(torch.optim.lr_scheduler.LambdaLR):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            if state["last_epoch"] == 3:
                raise AttributeError("not from here")
            super().load_state_dict(state)

    path = tmp_path / "run.pt"
    trainers = []
    for steps in (3, 1):
        seed(steps)
        trainer = make()
        trainer.scheduler = Own(trainer.optimizer, lambda step: 1.0)
        trainers.append(trainer.fit(steps=steps))
    trainers[0].save(path)
    before = flat(trainers[1]._state(), bits(trainers[1].tuner.model))
    with pytest.raises(ValueError, match=r"run\.pt: not from here"):
        trainers[1].resume(path)
    same(flat(trainers[1]._state(), bits(trainers[1].tuner.model)), before)


# What a checkpoint can hold


def test_numpys_numbers_are_saved_as_pythons(tmp_path: Path) -> None:
    """In a learning rate, a schedule's limits and its milestones; and the run goes on with the same bits."""

    def build() -> Trainer:
        trainer = make(kind=lambda tuner, lr: AdamW(tuner, lr=np.float64(lr)))
        trainer.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            trainer.optimizer, max_lr=np.float64(0.02), total_steps=int(np.int64(9)), pct_start=np.float64(0.3)
        )
        trainer.scheduler.seen = {np.int64(3): [np.float64(0.5), np.bool_(True)], "counts": defaultdict(int, a=1)}
        return trainer

    path = tmp_path / "run.pt"
    seed(1)
    wanted = everything(build().fit(steps=5))
    seed(1)
    build().fit(steps=2).save(path)
    loaded = torch.load(path, weights_only=True)
    assert type(loaded["optimizer"]["state"]["param_groups"][0]["max_lr"]) is float
    assert loaded["scheduler"]["seen"] == {3: [0.5, True], "counts": {"a": 1}}
    same(everything(build().resume(path).fit(steps=5)), wanted)


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (np.float32(0.1), r"the scheduler's state\['odd'\] is a numpy\.float32, .* give it Python's numbers"),
        (np.ones(2), r"the scheduler's state\['odd'\] is a numpy\.ndarray, which no checkpoint holds"),
        ([1, print], r"the scheduler's state\['odd'\]\[1\] is a builtins\.builtin_function_or_method"),
        (Path("a"), r"is a pathlib\."),
    ],
)  # fmt: skip
def test_what_could_not_be_read_again_is_refused_before_a_step(tmp_path: Path, odd: Any, says: str) -> None:
    trainer = make(checkpoint=tmp_path / "run.pt")
    trainer.scheduler.odd = odd
    for refused in (lambda: trainer.fit(steps=1), lambda: trainer.save(tmp_path / "run.pt")):
        with pytest.raises(ValueError, match=says):
            refused()
    assert trainer.step == 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "run.pt"
    trainer = make().fit(steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"run\.pt: the checkpoint cannot be written: "):
            trainer.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    trainer.save(path)
    make().resume(path)
