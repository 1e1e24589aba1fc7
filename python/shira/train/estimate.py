"""`estimate`: the memory that training a model takes, and what ranks send each other, before anything is loaded.

The model runs once, forward and backward, on tensors without content (torch's fake tensors), so a model of hundreds of
billions of parameters takes seconds and no memory. What such a run would have in memory is counted as it comes and
goes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from shira import _model
from shira.masks import Mask, default
from shira.train import _layers, _targets

__all__ = ["Estimate", "estimate"]

MOMENTS = 2  # AdamW's
_POSITION = 8  # bytes of a granule's place in the adapter, which ranks keep for those of their own


@dataclass(frozen=True)
class Estimate:
    """Bytes of one rank while it trains, and bytes that one rank sends in a step. `str` gives a table."""

    parameters: int
    """Parameters of the model, on all ranks together."""
    nnz: int
    """Trained entries, on all ranks together."""
    world_size: int

    weights: int
    """The rank's part of parameters and buffers."""
    gathered: int
    """Weights that FSDP2 has put together at one time: those outside the blocks, and two blocks. 0 on one rank."""
    indices: int
    """All indices; and on several ranks those of the rank's own part, with their places among all."""
    base: int
    """The base's entries, which `SparseTuner.detach` writes back."""
    values: int
    moments: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    passing: int
    """What else is in memory at the worst moment of the two passes: results on their way, and gradients."""

    sent_weights: int
    """FSDP2 gathers each weight twice in a step, before its forward and before its backward."""
    sent_training: int
    """Gradients of the trained entries, added up (float32), and their values (the weights' dtype), gathered."""

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        kept = self.weights + self.gathered + self.indices + self.base + self.values + self.moments
        return kept + self.activations + self.passing

    def __str__(self) -> str:
        ranks = "one rank" if self.world_size == 1 else f"each of {self.world_size} ranks"
        rows = [(name, getattr(self, name)) for name in ("weights", "gathered", "indices", "base", "values", "moments")]
        rows += [("activations", self.activations), ("passing", self.passing), ("peak", self.peak)]
        if self.world_size > 1:
            rows += [("sent a step: weights", self.sent_weights), ("sent a step: training", self.sent_training)]
        head = f"{self.parameters:,} parameters, {self.nnz:,} of them trained; {ranks}:"
        return "\n".join([head, *(f"  {name:22}{nbytes / 1e9:12,.3f} GB" for name, nbytes in rows)])


def estimate(
    model: Any,
    mask: Mask | None = None,
    tokens: int | tuple[int, int] = 2048,
    world_size: int = 1,
    *,
    targets: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    batch: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Estimate:
    """What a step of `SparseTuner` and `shira.AdamW` needs in memory, and sends, on each rank. Nothing is changed.

    With ``world_size`` above 1 the ranks train with FSDP2: ``fully_shard`` on each block (each module of the model's
    ``nn.ModuleList`` with the most parameters) and on the model, which is gathered again for the backward pass. Each
    rank has a batch of its own.

    The tuner is one without ``whole``, with sampled gradients where layers allow them, and no overlay. It does not
    count what kernels take for themselves, what the allocator keeps or loses (a GPU's to blocks of 512
    bytes, and by fragments), and what the process had before. Attention is counted as
    ``torch.nn.functional.scaled_dot_product_attention`` runs it on this machine's CPU, which keeps no scores.

    Args:
        model: a module, which may be on the meta device, and may have gradient checkpointing on; or the config of a
            transformers model for causal language modeling.
        mask: as for `SparseTuner`; None: ``shira.masks.default()``. Only its number of entries counts (that of
            `shira.masks.Struct` is its budget).
        tokens: of a rank's batch: the length of a single sequence, or (sequences, length).
        world_size: the number of ranks.
        targets, exclude: as for `SparseTuner`.
        batch: for models that are not called with ``input_ids`` and ``labels``: a mapping, a tuple, a list or a tensor,
            as for calibration. Only shapes and dtypes count.
        loss: ``loss(model, batch)``; None: the model's own ``output.loss``, or its output if that is a scalar.
        dtype: of the model that a config stands for.

    Raises:
        TypeError, ValueError: an argument is of another kind; or the model's forward looks at the content of its
            inputs, which such a run does not have.
    """
    sequences, length = (1, tokens) if isinstance(tokens, int) else tokens
    if not (type(sequences) is type(length) is int and sequences > 0 and length > 0):
        raise ValueError(f"estimate: tokens must be a length or (sequences, length), of at least 1, got {tokens!r}")
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"estimate: world_size must be a whole number of at least 1, got {world_size!r}")
    model = _model.unwrap(model) if isinstance(model, nn.Module) else _of_config(model, dtype)
    mask = default() if mask is None else mask
    chosen = _targets.Names(model, meta=True).targets(targets, exclude)
    mask.check({name: group[0].weight for name, group in chosen.items()})

    nnz = indices = base = values = sent = own = 0
    sites = []
    for name, group in chosen.items():
        weight = group[0].weight
        granule = mask.granule_of(weight)
        count = mask.count(name, weight)
        rule = _targets.rules(group, granule)[0]
        index = 4 if weight.numel() // granule < 2**31 else 8
        master = 8 if weight.dtype == torch.float64 else 4
        nnz, values = nnz + count * granule, values + count * granule * master
        indices, base = indices + count * index, base + count * granule * weight.itemsize
        own += count * (index + _POSITION)
        sent += count * granule * (master + weight.itemsize)
        sites.append(_Site([(slot.module, slot.attribute) for slot in group], rule, count, granule, index, master))
    activations, most = _run(model, sites, (sequences, length), batch, loss)

    sizes = _bytes(model)
    blocks = _blocks(model)
    inside = [sum(sizes[one] for one in _held(block) if one in sizes) for block in blocks]
    total = sum(sizes.values())
    share, ring = 1 / world_size, (world_size - 1) / world_size
    many = world_size > 1
    return Estimate(
        parameters=sum({_model.memory(p): p.numel() for p in model.parameters()}.values()),
        nnz=nnz,
        world_size=world_size,
        weights=round(total * share),
        gathered=total - sum(inside) + sum(sorted(inside)[-2:]) if many else 0,
        indices=indices + (round(own * share) if many else 0),
        base=round(base * share),
        values=round(values * share),
        moments=round(MOMENTS * values * share),
        activations=activations,
        passing=most - activations,
        sent_weights=round(2 * total * ring),
        sent_training=round(sent * ring),
    )


def _of_config(config: Any, dtype: torch.dtype) -> nn.Module:
    if not hasattr(config, "model_type"):
        raise TypeError(
            f"estimate: model must be a torch.nn.Module or the config of a transformers model, got "
            f"{type(config).__name__}"
        )
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


# ---- weights ---------------------------------------------------------------------------------------------------


def _held(module: nn.Module) -> set[object]:
    return {_model.memory(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _bytes(model: nn.Module) -> dict[object, int]:
    """Of each piece of memory that parameters and buffers have."""
    return {_model.memory(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is gathered together: the members of the list of modules with the most parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    largest = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)
    return [] if largest is None else list(largest)


# ---- the run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """What trains one weight."""

    places: list[tuple[nn.Module, str]]
    rule: str | None
    count: int
    granule: int
    index: int
    master: int


class _Count(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def _gone(self, nbytes: int) -> None:
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self.now += (nbytes := storage.nbytes())
                weakref.finalize(storage, self._gone, nbytes)
        self.most = max(self.most, self.now)
        return found


def _run(
    model: nn.Module,
    sites: list[_Site],
    tokens: tuple[int, int],
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> tuple[int, int]:
    """Bytes after the forward pass, and the most bytes at any time, besides what was there before."""
    if batch is None:
        ids = torch.empty(tokens, dtype=torch.int64, device="meta")
        batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    with FakeTensorMode(), contextlib.ExitStack() as stack:

        def fake(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype)

        state = {name: fake(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        own = {id(tensor): state[name] for name, tensor in model.named_parameters()}
        given = [
            torch.empty(site.count * site.granule, dtype=torch.float64 if site.master == 8 else torch.float32)
            for site in sites
        ]
        for site, values in zip(sites, given, strict=True):
            stack.enter_context(_attached(site, values.requires_grad_(), own))
        called = tree_map_only(Tensor, fake, batch)
        counted = _Count([t for t in tree_leaves((state, given, called)) if isinstance(t, Tensor)])
        stack.enter_context(counted)

        def step(model: nn.Module) -> int:
            """A forward and a backward pass; returns the bytes between them."""
            scalar = _called(model, called) if loss is None else loss(model, called)
            kept = counted.now
            scalar.backward()
            return kept

        try:
            # The backward pass too: checkpointing runs layers again there.
            step_state = {f"model.{name}": tensor for name, tensor in state.items()}
            kept: int = torch.func.functional_call(_Step(model, step), step_state, ())
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise ValueError(
                f"estimate: {type(model).__name__} did not run on tensors without content "
                f"({type(error).__name__}: {said}); give it what it is called with by batch=, and what is to be "
                f"minimised by loss="
            ) from error
        return kept, counted.most


class _Step(nn.Module):
    """A function of the model as a module, so that its tensors can be replaced while the function runs."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], int]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> int:
        return self.function(self.model)


def _called(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    if isinstance(output, Tensor):
        return output
    return _loss_of(output)


def _loss_of(output: Any) -> Tensor:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"its output, a {type(output).__name__}, has no loss")
    return found


@contextlib.contextmanager
def _attached(site: _Site, values: Tensor, own: dict[int, Tensor]) -> Iterator[None]:
    """While the context lasts the layers give the values their gradient, as under a tuner."""
    handles = []
    if site.rule is None:
        for module, attribute in site.places:
            weight = own[id(getattr(module, attribute))].requires_grad_()

            def gathered(weight: Tensor) -> None:
                weight.grad = None
                values.grad = torch.empty_like(values)

            handles.append(weight.register_post_accumulate_grad_hook(gathered))
    else:
        rule, width = site.rule, torch.int32 if site.index == 4 else torch.int64
        indices = torch.empty(site.count, dtype=width)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            input = args[0] if args else kwargs["input"]
            return _layers.attach(rule, module, output, values, input, indices, site.granule)

        for module in {id(module): module for module, _ in site.places}.values():
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
