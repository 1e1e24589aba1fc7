"""Ways to adapt a base to a task, trained by one loop: SHiRA with its masks, PEFT's LoRA and DoRA, full fine-tuning.

A method says how it is put on a model, what it trains, and what comes out: a `shira.Adapter` in every case, for LoRA
the dense change of its weights. So one switcher applies, scales and fuses the adapters of every method.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import shira
import shira_ops
from benchmarks.quality import tried
from benchmarks.quality.task import Task, measured
from shira import Adapter, Entry, Switcher, masks
from shira._model import VALUES_SUFFIX
from shira.masks.masks import Mask

LINE_ENTRIES = 32  # bfloat16 entries of a 64-byte cache line
CALIBRATION_SEED = 1_000_003  # for the batches that masks look at; training uses other seeds


@dataclass
class Attached:
    """A method on a model: what to train, how to step, and how to get the adapter."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    adapter: Any  # () -> Adapter, to be called once, after training and scoring: the model is not usable afterwards

    before: Callable[[int, int, Any], None] = lambda step, steps, batch: None
    """Called before each step; what it changes here counts from that step on."""

    @property
    def trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass(frozen=True)
class Method:
    """What all methods share. ``start`` is the learning rate at which the search begins (`lab.Lab.tuned`)."""

    kind: ClassVar[str]
    start: ClassVar[float]

    def describe(self) -> dict[str, Any]:
        """What identifies the method in the results: its name, and what differs from the defaults."""
        default = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {"kind": self.kind, **{name: value for name, value in asdict(self).items() if value != default[name]}}

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        raise NotImplementedError


# ---- SHiRA ---------------------------------------------------------------------------------------------------


class BalancedRand(masks.Rand):
    """A random mask with the same number of granules in every row."""

    def seed_for(self, name: str) -> int | None:
        return None

    def select(self, name: str, weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed(name) >> 1)
        drawn = torch.rand(weight.shape, generator=generator)
        best = masks.WeightMagnitude(self.density, r=self.r, granule=self.granule, balanced=True, skip=self.skip)
        return best.select(name, drawn)


MASKS = ("rand", "struct", "wm", "grad", "snip")
"""The paper's."""
LATER = ("principal",)
"""What others have proposed since; compared in experiment 1 alone."""
_CLASSES: dict[str, type[Mask]] = {
    "rand": masks.Rand, "struct": masks.Struct, "wm": masks.WeightMagnitude, "grad": masks.Grad, "snip": masks.Snip,
    "principal": masks.Principal, "activation": tried.Activation, "top-rows": tried.TopRows,
    "half-snip": tried.HalfSnip,
}  # fmt: skip
TRIED = ("activation", "top-rows", "half-snip")
"""Masks that the library does not have."""
CALIBRATED = ("grad", "snip", "top-rows", "half-snip")


@dataclass(frozen=True)
class Shira(Method):
    """SHiRA by `shira.SparseTuner` and `shira.AdamW`.

    The budget is ``density``, or ``r``: as many entries as a LoRA of that rank has parameters. ``part`` numbers masks
    of one kind that share no entry: 0 is the mask itself, 1 has the next best entries, and so on. ``mixed`` gives the
    weights different densities, while the model keeps the same number of entries (`densities`).
    """

    kind: ClassVar[str] = "shira"
    start: ClassVar[float] = 1e-1

    mask: str = "rand"
    density: float | None = None
    r: int | None = None
    granule: int = 1
    balanced: bool = False
    part: int = 0
    mixed: str = ""  # or "first", "last", "magnitude"
    calibration: int = 8  # batches
    lines: str = "rows"  # for Struct: rows or columns

    def make(self, seed: int, density: float | dict[str, float] | None = None) -> Mask:
        options: dict[str, Any] = {"granule": self.granule}
        if self.mask in ("rand", "top-rows", "half-snip"):
            options["seed"] = seed
        if self.mask == "struct":
            options["lines"] = self.lines
        kind = _CLASSES[self.mask]
        if self.balanced and self.mask == "rand":
            kind = BalancedRand
        elif self.balanced:
            options["balanced"] = True
        if self.part:
            options["skip"] = [replace(self, part=part).make(seed) for part in range(self.part)]
        return kind(density or self.density, r=self.r, **options)

    def densities(self, model: nn.Module, task: Task) -> dict[str, float] | None:
        """Each weight's own density: falling from the first weight to the last by a factor of seven, or rising as
        much, or following where the granules with the largest magnitudes of all weights lie."""
        if not self.mixed:
            return None
        assert self.density is not None
        weights = {name: model.get_parameter(name).detach() for name in target_names(model, task)[0]}
        sizes = torch.tensor([weight.numel() for weight in weights.values()])
        if self.mixed == "magnitude":
            scores = [weight.abs().view(-1, self.granule).sum(1) for weight in weights.values()]
            best = torch.cat(scores).sort(descending=True).values
            last = best[max(1, round(self.density * len(best))) - 1]
            shares = [float((score >= last).double().mean()) for score in scores]
        else:
            ramp = torch.linspace(1.75, 0.25, len(weights), dtype=torch.float64)
            ramp = ramp if self.mixed == "first" else ramp.flip(0)
            shares = (self.density * ramp * sizes.sum() / (ramp * sizes).sum()).clamp(max=1).tolist()
        # Masks refuse a density of 0; with a tiny one they take a single granule.
        return {f"^{re.escape(name)}$": max(share, 1e-9) for name, share in zip(weights, shares, strict=True)}

    def tuner(self, model: nn.Module, task: Task, seed: int) -> shira.SparseTuner:
        batches = None
        if self.mask in (*CALIBRATED, "activation"):
            batches = list(task.batches(CALIBRATION_SEED + seed, self.calibration))
        calibrated = self.mask in CALIBRATED
        if self.mask == "activation":
            norms = tried.norms(model, task, target_names(model, task)[0], batches or ())
            mask: Mask = tried.Activation(self.density, r=self.r, granule=self.granule, norms=norms)
        else:
            mask = self.make(seed, self.densities(model, task))
        return shira.SparseTuner(
            model,
            mask,
            targets=task.targets,
            whole=task.whole,
            calibration=batches if calibrated else None,
            loss=task.loss if calibrated else None,
        )

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        with self.tuner(model, task, seed) as tuner:
            optimizer = shira.AdamW(groups(tuner.named_parameters(), task, lr), weight_decay=0.0)
            yield Attached(list(tuner.parameters()), optimizer, tuner.adapter)


@dataclass(frozen=True)
class ShiraDora(Shira):
    """SHiRA-DoRA by `shira.DoRATuner`: a DoRA of which only the mask's entries reach the weights.

    The mask has as many entries as `Shira` of the same budget, so the adapter is as large and switches as fast. DoRA's
    rank is ``times`` the one of the budget: the paper trains about six times as many parameters as entries change.
    """

    kind: ClassVar[str] = "shira-dora"

    times: int = 6

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        if self.r is None or task.whole is not None or self.mask not in ("rand", "wm"):
            raise ValueError(f"{self} is for r=, the masks rand and wm, and tasks without a head of their own")
        with shira.DoRATuner(model, self.make(seed), task.targets, rank=self.times * self.r) as tuner:
            optimizer = torch.optim.AdamW(groups(tuner.named_parameters(), task, lr), weight_decay=0.0)
            yield Attached(list(tuner.parameters()), optimizer, tuner.adapter)


@dataclass(frozen=True)
class Moving(Shira):
    """A mask that moves once, as those of RigL and SpIEL do many times.

    After ``after`` of the steps the ``share`` of the granules that are nearest to the base go back to it, and as many
    others take their place: those with the largest gradients (of one batch), of the whole weight or (``rows``) of every
    row. What stays keeps the optimizer's averages; what is new starts with the mean of theirs.
    """

    kind: ClassVar[str] = "moving"

    share: float = 0.5
    after: float = 0.25
    rows: bool = False

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        with ExitStack() as stack:
            tuner = stack.enter_context(self.tuner(model, task, seed))
            optimizer = shira.AdamW(groups(tuner.named_parameters(), task, lr), weight_decay=0.0)
            attached = Attached(list(tuner.parameters()), optimizer, tuner.adapter)

            def before(step: int, steps: int, batch: Any) -> None:
                if step != max(1, round(self.after * steps)):
                    return
                adapter = attached.adapter()
                averages = {name: attached.optimizer.state[one] for name, one in tuner.named_parameters()}
                stack.close()  # the base is back
                now = self.moved(model, task, adapter, batch)
                new = stack.enter_context(shira.SparseTuner.from_adapter(model, now))
                attached.optimizer = shira.AdamW(groups(new.named_parameters(), task, lr), weight_decay=0.0)
                for name, one in new.named_parameters():
                    was, is_ = (some.weights[name.removesuffix(VALUES_SUFFIX)] for some in (adapter, now))
                    attached.optimizer.state[one] = carried(averages[name], was, is_)
                attached.parameters, attached.adapter = list(new.parameters()), new.adapter

            attached.before = before
            yield attached

    def moved(self, model: nn.Module, task: Task, adapter: Adapter, batch: Any) -> Adapter:
        """The adapter with its granules moved; ``model`` holds the base."""
        names = [name for name in adapter.weights if not is_whole(task, name)]
        gradients = self.gradients(model, task, adapter, names, batch)
        entries = dict(adapter.weights)
        for name in names:
            entry, weight = entries[name], model.get_parameter(name).detach()
            values = entry.values.view(-1, entry.granule)
            base = weight.view(-1, entry.granule)
            change = (values - base[entry.indices.long()]).abs().sum(1)
            leaving = round(self.share * len(change))
            kept = change.sort(descending=True, stable=True).indices[: len(change) - leaving].sort().values
            if leaving:
                skip = replace_entry(entry, entry.indices[kept], values[kept].flatten())
                share = leaving * entry.granule / entry.numel
                taken = Adapter({name: skip, **{other: entries[other] for other in names if other != name}})
                grow = masks.WeightMagnitude(share, granule=entry.granule, balanced=self.rows, skip=taken)
                new = grow(name, gradients[name])
                indices = torch.cat([entry.indices[kept], new])
                order = indices.sort().indices
                both = torch.cat([values[kept], base[new.long()].to(values.dtype)])
                entries[name] = replace_entry(entry, indices[order], both[order].flatten())
        return Adapter(entries)

    def gradients(
        self, model: nn.Module, task: Task, adapter: Adapter, names: list[str], batch: Any
    ) -> dict[str, Tensor]:
        """The dense gradients of the adapted model."""
        switcher = Switcher(model)
        switcher.add("now", adapter)
        weights = [model.get_parameter(name) for name in names]
        with switcher.using("now"):
            for weight in weights:
                weight.requires_grad_(True)
            found = torch.autograd.grad(task.loss(model, batch), weights)
            for weight in weights:
                weight.requires_grad_(False)
        return dict(zip(names, found, strict=True))


def replace_entry(entry: Entry, indices: Tensor, values: Tensor) -> Entry:
    """The entry with others of its weight's granules."""
    return replace(entry, indices=indices.to(entry.indices.dtype), values=values, seed=None)


def carried(state: dict[str, Any], before: Entry, now: Entry) -> dict[str, Any]:
    """Adam's averages for the granules that are trained now: their own, or for a new one the mean of all."""
    if torch.equal(before.indices, now.indices):
        return state
    place = torch.searchsorted(before.indices, now.indices).clamp(max=len(before.indices) - 1)
    stayed = (before.indices[place] == now.indices).repeat_interleave(now.granule)
    found = dict(state)
    for which, start in (("exp_avg", 0.0), ("exp_avg_sq", float(state["exp_avg_sq"].mean()))):
        old = state[which].view(-1, now.granule)[place].flatten()
        found[which] = torch.where(stayed, old, torch.full_like(old, start))
    return found


# ---- the others ----------------------------------------------------------------------------------------------


def target_names(model: nn.Module, task: Task) -> tuple[list[str], list[str]]:
    """The names of the weights that adapters change, and of the parameters that are trained whole."""
    from shira.train._targets import Names

    names = Names(model)
    whole = list(names.whole(task.whole))
    return [name for name in names.targets(task.targets) if name not in whole], whole


def groups(parameters: Iterable[tuple[str, nn.Parameter]], task: Task, lr: float) -> list[dict[str, Any]]:
    """Parameter groups: what adapts the model trains at this rate, what is trained whole at the task's."""
    rates: dict[bool, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        rates.setdefault(is_whole(task, name), []).append(parameter)
    peaks = {whole: task.whole_lr if whole else lr for whole in rates}
    return [{"params": found, "lr": peaks[whole], "initial_lr": peaks[whole]} for whole, found in rates.items()]


def dense_adapter(model: nn.Module, base: dict[str, Tensor], names: Iterable[str]) -> Adapter:
    """An adapter of the whole change of these parameters, to be added to the base."""
    entries = {}
    for name in names:
        before, after = base[name], model.get_parameter(name).detach()
        entries[name] = Entry(
            torch.zeros(1, dtype=torch.int32),
            (after - before).flatten(),
            tuple(before.shape),
            before.dtype,
            before.numel(),
            int(shira_ops.fingerprint(before)) % 2**64,
            checked=True,
        )
    return Adapter(entries, delta=True)


def copies(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach().clone() for name in names}


@dataclass(frozen=True)
class Lora(Method):
    """PEFT's LoRA on the same weights, with a scale of 2 (``lora_alpha = 2 * r``)."""

    kind: ClassVar[str] = "lora"
    start: ClassVar[float] = 1e-2
    dora: ClassVar[bool] = False

    r: int = 1

    def config(self, modules: list[str], seed: int) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=self.r, lora_alpha=2 * self.r, target_modules=modules, use_dora=self.dora)

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        from peft import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets, whole = target_names(model, task)
        base = copies(model, whole)
        modules = [name.removesuffix(".weight") for name in targets]
        inject_adapter_in_model(self.config(modules, seed), model)
        trained_in_float(model)
        for name in whole:
            model.get_parameter(name).requires_grad_(True)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        parameters = [parameter for _, parameter in trained]

        def adapter() -> Adapter:
            for name, layer in list(model.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    base[f"{name}.weight"] = layer.get_base_layer().weight.detach().clone()
                    layer.merge()
                    parent, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
            return dense_adapter(model, base, base)

        yield Attached(parameters, torch.optim.AdamW(groups(trained, task, lr), weight_decay=0.0), adapter)


@dataclass(frozen=True)
class Dora(Lora):
    """PEFT's DoRA: LoRA with a trained magnitude for every row."""

    kind: ClassVar[str] = "dora"
    dora: ClassVar[bool] = True


@dataclass(frozen=True)
class PeftShira(Lora):
    """PEFT's own SHiRA with a random mask, which adds a sparse matrix to the weight in every forward pass."""

    kind: ClassVar[str] = "peft-shira"
    start: ClassVar[float] = 1e-1

    def config(self, modules: list[str], seed: int) -> Any:
        from peft import ShiraConfig

        return ShiraConfig(r=self.r, target_modules=modules, random_seed=seed)


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: every parameter of the model."""

    kind: ClassVar[str] = "full"
    start: ClassVar[float] = 1e-3

    @contextmanager
    def attached(self, model: nn.Module, task: Task, lr: float, seed: int) -> Iterator[Attached]:
        names = [name for name, _ in model.named_parameters()]
        parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
        # Half precision would swallow small steps: they are taken in float32, and the weights follow.
        masters = {
            name: one if one.dtype == torch.float32 else nn.Parameter(one.detach().float())
            for name, one in model.named_parameters()
        }
        optimizer = torch.optim.AdamW(groups(masters.items(), task, lr), weight_decay=0.0)
        follow(optimizer, [(one, masters[name]) for name, one in model.named_parameters() if one is not masters[name]])
        yield Attached(parameters, optimizer, lambda: dense_adapter(model, copies(task.base(), names), names))


def trained_in_float(model: nn.Module) -> None:
    """Adapters of a half precision model in float32, as ``peft.get_peft_model`` has them."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def follow(optimizer: torch.optim.Optimizer, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Steps are taken with the second of each pair, and copied to the first, which has the gradients."""

    def before(*_: Any) -> None:
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def after(*_: Any) -> None:
        for weight, master in pairs:
            weight.copy_(master)

    if pairs:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


KINDS: dict[str, type[Method]] = {
    method.kind: method for method in (Shira, ShiraDora, Moving, Lora, Dora, PeftShira, Full)
}


def from_description(description: dict[str, Any]) -> Method:
    """The method that `Method.describe` described."""
    options = dict(description)
    return KINDS[options.pop("kind")](**options)


# ---- training ------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """The outcome of one training run."""

    adapter: Adapter
    record: dict[str, Any]


def train(task: Task, method: Method, lr: float, seed: int, steps: int, fraction: float = 1.0) -> Trained:
    """Adapt a fresh base: AdamW without decay. The rate rises over a tenth of the steps, then follows a cosine."""
    model = task.base()
    torch.manual_seed(seed)  # for LoRA's initial values; making the base may have drawn random numbers
    with method.attached(model, task, lr, seed) as attached:
        last = math.nan
        for step, batch in enumerate(task.batches(seed, steps, fraction)):
            attached.before(step, steps, batch)
            optimizer = attached.optimizer
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(step, steps)
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            last = loss.item()
            if not math.isfinite(last):
                break  # the score shows it
            optimizer.step()
        model.eval()
        record = {
            **measured(task, model),
            "loss": last if math.isfinite(last) else None,
            "trainable": attached.trainable,
        }
        adapter = attached.adapter()
    record |= costs(adapter, method, task)
    return Trained(adapter, record)


def factor(step: int, steps: int) -> float:
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def is_whole(task: Task, name: str) -> bool:
    """Whether a parameter is trained whole beside every method."""
    return task.whole is not None and re.search(task.whole, name) is not None


def costs(adapter: Adapter, method: Method, task: Task) -> dict[str, Any]:
    """What switching the adapter touches and what storing it takes, of the adapted weights alone, as if in bfloat16."""
    entries = {name: entry for name, entry in adapter.weights.items() if not is_whole(task, name)}
    total = sum(entry.numel for entry in entries.values())
    if not isinstance(method, Shira):
        return {"targets": total}
    index_bytes, touched, nnz = 0, 0, 0
    for entry in entries.values():
        index_bytes += shira_ops.encode_indices(entry.indices).numel()
        first = entry.indices.long() * entry.granule
        ends = torch.cat([first // LINE_ENTRIES, (first + entry.granule - 1) // LINE_ENTRIES])
        touched += ends.unique().numel()
        nnz += entry.nnz
    return {
        "targets": total,
        "nnz": nnz,
        "lines": touched * LINE_ENTRIES / total,
        "bytes": index_bytes + 2 * nnz,
    }
