"""Weights that several ranks hold together, a part each: those of FSDP2 (``fully_shard``) and of tensor parallelism.

Every rank knows all indices of a weight. Its *values* are one DTensor, divided evenly between all ranks in the order of
the adapter's file, however the weight itself is divided. So nothing depends on where a mask's entries happen to lie,
and clipping, optimizers and checkpoints find an ordinary parameter. Two exchanges connect both, each in one collective
for the whole model (or a few, so that buffers stay small):

- a backward pass gives each rank the gradients at the indices of the part of the weight that it has computed with, for
  its own batch. When the pass is over, they are added up, and each rank gets those of its values (`flush`);
- after a step of an optimizer every rank gets all values, in the weight's dtype, and writes those that are in its box
  (`Sharded.entries`).

No dense gradient of a weight is made, and what is added up is fp32 whatever FSDP's own policy says. The exception are
targets of dense gradients (`gradient="dense"`, whole parameters, layers whose gradient only autograd knows): theirs is
made and reduced by FSDP and DTensor as ever, each rank keeps the mask's entries of its part, and it is freed at once.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, distributed, nn

import shira_ops
from shira import _granules, _model, _shards
from shira._granules import dtype_name, fnv1a64, signed
from shira.adapter import _file
from shira.masks import calibration
from shira.masks.masks import Grad, Mask, Principal, Snip, WeightMagnitude
from shira.train import _layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from shira.adapter.adapter import Adapter
    from shira.train._sites import Group, Site

# How a weight is divided while a layer computes with it; None: not at all.
Layout: TypeAlias = "tuple[DeviceMesh, tuple[Any, ...]] | None"

# The masks whose scores depend on each granule alone.
_SCORED = (WeightMagnitude, Grad, Snip)

# How many entries one collective moves, so that its buffers stay small beside the model.
_BUCKET = 2**26


def runs(counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> Iterator[slice]:
    """Runs of tensors that travel together: of one dtype, and not too many entries."""
    begin, total = 0, 0
    for at, (count, dtype) in enumerate(zip(counts, dtypes, strict=True)):
        if at > begin and (total + count > _BUCKET or dtype != dtypes[begin]):
            yield slice(begin, at)
            begin, total = at, 0
        total += count
    if counts:
        yield slice(begin, len(counts))


# ---- exchanges between ranks ---------------------------------------------------------------------------------


class Ranks:
    """The ranks of a mesh in one row, and what they tell each other. All of them must call together."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh if mesh.ndim == 1 else mesh._flatten()
        self.group = self.mesh.get_group()
        self.size, self.rank = self.mesh.size(), self.mesh.get_local_rank()

    def chunk(self, count: int) -> int:
        """How many of ``count`` values a rank has at most: the first ranks have so many."""
        return -(-count // self.size)

    def span(self, count: int) -> tuple[int, int]:
        """The values of this rank: the first one, and how many."""
        most = self.chunk(count)
        begin = min(self.rank * most, count)
        return begin, min(most, count - begin)

    def values(self, chunk: Tensor, count: int) -> DTensor:
        """This rank's values as a part of all."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(chunk, self.mesh, [Shard(0)], run_check=False, shape=torch.Size([count]), stride=(1,))

    def join(self, chunks: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Every rank's values, from the chunks of all ranks."""
        joined: list[Tensor] = []
        for run in runs(counts, [chunk.dtype for chunk in chunks]):
            widths = [self.chunk(count) for count in counts[run]]
            sent = chunks[run.start].new_zeros(sum(widths))
            for place, chunk in zip(sent.split(widths), chunks[run], strict=True):
                place[: chunk.numel()] = chunk
            got = sent.new_empty(self.size * sent.numel())
            _collective("all_gather")(got, sent, group=self.group)
            columns = got.view(self.size, -1).split(widths, 1)
            joined += (column.reshape(-1)[:count] for column, count in zip(columns, counts[run], strict=True))
        return joined

    def add(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors that are added up over all ranks, the chunks of this rank."""
        chunks: list[Tensor] = []
        counts = [whole.numel() for whole in wholes]
        for run in runs(counts, [whole.dtype for whole in wholes]):
            widths = [self.chunk(count) for count in counts[run]]
            sent = wholes[run.start].new_zeros(self.size, sum(widths))
            at = 0
            for whole, width in zip(wholes[run], widths, strict=True):
                rows = whole.new_zeros(self.size * width)
                rows[: whole.numel()] = whole
                sent[:, at : at + width] = rows.view(self.size, width)
                at += width
            got = sent.new_empty(sum(widths))
            _collective("reduce_scatter")(got, sent.view(-1), group=self.group)
            for chunk, count in zip(got.split(widths), counts[run], strict=True):
                chunks.append(chunk[: self.span(count)[1]].clone())
        return chunks

    def same(self, words: Sequence[int]) -> list[bool]:
        """Which of these 64-bit words are the same on all ranks, which give equally many."""
        least = torch.tensor(words, dtype=torch.int64, device=self._device)
        most = least.clone()
        distributed.all_reduce(least, distributed.ReduceOp.MIN, group=self.group)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self.group)
        found: list[bool] = (least == most).tolist()
        return found

    def sum(self, words: Sequence[int]) -> list[int]:
        """64-bit words added up over all ranks."""
        total = torch.tensor(words, dtype=torch.int64, device=self._device)
        distributed.all_reduce(total, group=self.group)
        found: list[int] = total.tolist()
        return found

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of all ranks."""
        most = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self.group)
        found: list[int] = most.tolist()
        return found

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, which is 1-D and equally long on all of them, one after the other."""
        got = tensor.new_empty(self.size * tensor.numel())
        _collective("all_gather")(got, tensor.contiguous(), group=self.group)
        return got

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of the first rank; all of them are of one shape and dtype."""
        tensor = tensor.contiguous()
        distributed.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def to_first(self, chunk: Tensor, count: int) -> list[Any]:
        """The bytes of all values, from the chunks of all ranks, on the first rank; nothing on the others."""
        size = chunk.element_size()
        sent = torch.zeros(self.chunk(count) * size, dtype=torch.uint8, device=chunk.device)
        sent[: chunk.numel() * size] = chunk.contiguous().view(torch.uint8)
        got = sent.new_empty(self.size, sent.numel()) if self.rank == 0 else None
        distributed.gather(sent, None if got is None else list(got), group=self.group, group_dst=0)
        return [] if got is None else [got.view(-1)[: count * size].cpu().numpy()]

    def told_by_first(self, text: str | None) -> str | None:
        """The text of the first rank."""
        texts = [text]
        distributed.broadcast_object_list(texts, group=self.group, group_src=0, device=self._device)
        return texts[0]

    @property
    def _device(self) -> torch.device:
        kind = self.mesh.device_type
        return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def _collective(name: str) -> Callable[..., Any]:
    """all_gather or reduce_scatter of one tensor, under the name that this torch has for it."""
    old = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}[name]
    found: Callable[..., Any] = getattr(distributed, f"{name}_single", None) or getattr(distributed, old)
    return found


# ---- what torch puts around weights --------------------------------------------------------------------------


def reshard(model: nn.Module) -> None:
    """Have FSDP drop what it gathered, so that modules hold their shards."""
    _shards.reshard(_shards.fsdp_modules(model))


def gathered_groups(model: nn.Module) -> list[Any]:
    """FSDP's groups of parameters that are gathered at present."""
    groups = (group for module in _shards.fsdp_modules(model) for group in _shards.fsdp_groups(module))
    return [group for group in groups if group is not None and group.is_unsharded]


def fsdp_of(model: nn.Module, owner: nn.Module, attribute: str) -> tuple[Any, Any] | None:
    """FSDP's group of parameters and its own entry for one; None if FSDP does not have it."""
    for module in _shards.fsdp_modules(model):
        for group in _shards.fsdp_groups(module):
            for found in () if group is None else group.fsdp_params:
                info = found._module_info
                places = [
                    (info.module, info.param_name),
                    *zip(info.shared_modules, info.shared_param_names, strict=True),
                ]
                if any(one is owner and name == attribute for one, name in places):
                    return group, found
    return None


def is_tensor_parallel(model: nn.Module, slot: _model.Slot) -> bool:
    """Whether a weight is sharded, and divided while its layer computes, too."""
    if not _shards.is_dtensor(slot.weight):
        return False
    found = fsdp_of(model, slot.module, slot.attribute)
    return found is None or bool(found[1].is_dtensor)


class Taken(NamedTuple):
    """A weight that FSDP has sharded with a tuner on it, and its values, which FSDP has sharded too."""

    weight: nn.Parameter
    values: nn.Parameter
    group: Any
    of_values: tuple[Any, Any]

    def release(self) -> None:
        """Have FSDP leave the values to the tuner, which needs neither their gathering nor FSDP's reduction."""
        group, found = self.of_values
        found.to_sharded()
        group.fsdp_params.remove(found)
        found._post_load_hook_handle.remove()


def taken(model: nn.Module, site: Site, owner: nn.Module) -> Taken | None:
    """What ``fully_shard`` has made of a weight and its values after the tuner was attached; None if a tuner cannot go
    on with that."""
    weight, values = fsdp_of(model, owner, site.attribute), fsdp_of(model, owner, site.values_name)
    if weight is None or values is None:
        return None
    sharded: Any = weight[1].sharded_param
    kept: Any = values[1].sharded_param
    if weight[1].is_dtensor or sharded.device_mesh != kept.device_mesh or sharded.device_mesh.ndim != 1:
        return None
    if not kept.placements[0].is_shard() or weight[1].offload_to_cpu or values[1].offload_to_cpu:
        return None
    return Taken(sharded, kept, weight[0], values)


def check_targets(model: nn.Module, groups: Mapping[str, Sequence[_model.Slot]]) -> list[str]:
    """The targets that are sharded: all of them or none. Refuses what cannot be trained, before anything is put on the
    model."""
    sharded = {name: group[0] for name, group in groups.items() if _shards.is_dtensor(group[0].weight)}
    if not sharded:  # as those of an overlay never are
        if groups and _shards.fsdp_modules(model):
            _refuse(next(iter(groups)), "is not sharded, and nothing would average its gradient over the ranks (is it "
                    "one of fully_shard's ignored_params?); leave it out with exclude=")  # fmt: skip
        return []
    for name in groups:
        if name not in sharded:
            _refuse(name, f"is not sharded, but {next(iter(sharded))} is, and nothing says whether the ranks compute "
                    f"the same with it; leave it out with exclude=, or give it a place in the plan too")  # fmt: skip
    first = next(iter(sharded))
    mesh = sharded[first].weight.device_mesh  # type: ignore[attr-defined]
    if mesh.ndim > 1 and not mesh.mesh_dim_names:
        _refuse(first, "is on a device mesh of several dimensions without names; make it with mesh_dim_names=")
    for name, slot in sharded.items():
        weight: Any = slot.weight
        if weight.device_mesh != mesh:
            _refuse(name, f"is on the device mesh {weight.device_mesh}, and {first} on {mesh}; a tuner trains weights "
                    f"of one mesh: use a tuner for each, or leave the others out with exclude=")  # fmt: skip
        try:
            _shards.Box.of(weight)
        except ValueError as error:
            _refuse(name, str(error))
        if not _shards.local(weight).is_contiguous():
            _refuse(name, "is a DTensor whose local tensor is not contiguous, and only contiguous memory can be "
                    "written; distribute a weight of which every rank has its own copy of its part")  # fmt: skip
        if _shards.local(weight).device.type != mesh.device_type:
            _refuse(name, f"is kept on {_shards.local(weight).device} by a CPUOffloadPolicy and computed with on "
                    f"{mesh.device_type}, which is not supported; use fully_shard without it")  # fmt: skip
    return list(sharded)


def _refuse(name: str, why: str) -> NoReturn:
    raise ValueError(f"SparseTuner: {name} {why}")


# ---- masks ---------------------------------------------------------------------------------------------------


def stand_in(weight: Tensor) -> Tensor:
    """Something of the shape, dtype and device of the whole weight, without memory for its entries."""
    return _shards.local(weight).new_zeros(()).expand(weight.shape)


def prepare(
    mask: Mask,
    model: nn.Module,
    groups: Mapping[str, Sequence[_model.Slot]],
    batches: Iterable[Any] | None,
    loss: calibration.Loss | None,
    ranks: Ranks,
) -> None:
    """For a mask by gradients: run the calibration batches of all ranks. A collective call."""
    places = {name: [(slot.module, slot.attribute) for slot in group] for name, group in groups.items()}

    def chosen(needing: Mask, name: str, _: Tensor, gradient: Tensor) -> Tensor:
        # FSDP may have gathered what the module holds.
        return _scored(ranks, needing, name, groups[name][0].weight, gradient)

    choose: dict[str, Any] = {"choose": chosen} if mask._is_calibrated else {}
    try:
        mask.prepare(model, places, batches, loss, **choose)
    finally:
        reshard(model)


def indices_of(mask: Mask, name: str, weight: DTensor, ranks: Ranks) -> Tensor:
    """What the mask selects of the whole weight, the same as in one process. A collective call."""
    if type(mask) is WeightMagnitude:
        return _scored(ranks, mask, name, weight, None)
    if type(mask) in _SCORED or not mask.reads_weights:
        return mask(name, stand_in(weight))
    # One weight at a time, as FSDP itself gathers them.
    chosen = mask(name, _whole(weight))
    # The approximation's last bits may differ between devices.
    return ranks.of_first(chosen) if isinstance(mask, Principal) else chosen


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.detach().full_tensor().contiguous()
    return whole


def _scored(ranks: Ranks, mask: Any, name: str, weight: Any, gradient: Any) -> Tensor:
    """The best granules of the whole weight; ``gradient`` is divided as the weight is."""
    box, here = _shards.Box.of(weight), _shards.local(weight)
    part = None if gradient is None else _shards.local(gradient)
    granule, k, score = mask.granule_of(weight), mask.count(name, weight), mask.score
    split = box.granule(granule) != granule  # and a score needs all entries of its granule
    own = 0 if split or not _shards.is_first(weight) else min(k, box.local_numel // granule)
    most, anywhere = ranks.most([own, split])
    if anywhere or mask.balanced or mask.skip or type(mask) not in _SCORED:
        best: Tensor = mask._choose(name, _whole(weight), None if gradient is None else _whole(gradient))
        return best
    # The best of the weight are among the best of each part.
    candidates = torch.full((most,), -1, dtype=torch.int64, device=here.device)
    ours = shira_ops.select_top(here, part, own, score=score, granule=granule) if own else None
    if ours is not None:
        candidates[:own] = box.globally(ours, granule)
    candidates = ranks.gather(candidates)
    order = candidates.argsort()[int((candidates < 0).sum()) :]

    def few(entries: Tensor) -> Tensor:
        sent = entries.new_zeros(most * granule)
        if ours is not None:
            sent[: own * granule] = shira_ops.gather(entries, ours, granule=granule)
        return ranks.gather(sent).view(-1, granule)[order].view(-1)

    chosen = shira_ops.select_top(few(here), None if part is None else few(part), k, score=score, granule=granule)
    return candidates[order[chosen]].to(_granules.index_dtype(weight.numel() // granule))


# ---- one weight ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sharded:
    """How one weight trains that the ranks hold together."""

    ranks: Ranks
    weight: weakref.ref[nn.Parameter]
    owner: weakref.ref[nn.Module]
    attribute: str
    # This rank's entries of the adapter, in its box of the weight.
    part: _shards.Part
    # The adapter's granules, and how many entries they have.
    granule: int
    count: int
    # FSDP's group of parameters, if the weight is in one.
    fsdp: Any
    # Whether the ranks know that they have the same mask and base; not yet if FSDP came after the tuner.
    compared: bool = True
    fingerprint: int = 0
    # What gives a layer's output a gradient. The values themselves get theirs at the end of the pass.
    lead: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    # The base's entries where this rank's values are; made when they are asked for.
    base: Tensor | None = None
    # When the gradient of a backward pass was there, if another stream than that of the pass has made it.
    made: Any = None
    _parts: dict[Any, _shards.Part] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, slot: _model.Slot, ranks: Ranks, indices: Tensor, granule: int) -> Sharded:
        weight: Any = slot.weight
        found = fsdp_of(model, slot.module, slot.attribute)
        return Sharded(
            ranks, weakref.ref(weight), weakref.ref(slot.module), slot.attribute,
            _shards.Box.of(weight).take(indices, granule), granule, indices.numel() * granule,
            None if found is None else found[0],
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "SparseTuner: a model with sharded weights cannot be copied or pickled while a tuner is attached; detach "
            "the tuner first, or keep tuner.state_dict() or tuner.adapter()"
        )

    def stored(self) -> Tensor:
        """The sharded parameter itself. While FSDP has it gathered, the module holds another one."""
        weight = self.weight()
        if weight is None:
            raise RuntimeError(
                "SparseTuner: a sharded weight was replaced by another parameter after the tuner was attached; detach "
                "the tuner before that, and attach it again"
            )
        return weight

    def is_holder_of(self, held: Any) -> bool:
        """Whether what the module holds is the weight, or what FSDP has gathered of it."""
        weight: Any = self.weight()
        if weight is None or held is None or held is weight:
            return weight is not None and held is weight
        if self.fsdp is None or tuple(held.shape) != tuple(weight.shape):
            return False
        if not _shards.is_dtensor(held):
            return True
        # On a mesh of its own: that of tensor parallelism, or a smaller one on which FSDP keeps it after a forward.
        return bool(held.device_mesh != weight.device_mesh)

    def everywhere(self, site: Site) -> Tensor:
        """The granules of the whole weight."""
        owner = self.owner()
        assert owner is not None
        found = owner._buffers[site.indices_name]
        assert found is not None
        return found

    def here(self) -> _shards.Part:
        """This rank's part, on the weight's device."""
        device = _shards.local(self.stored()).device
        if self.part.indices.device != device:
            self.part = self.part._replace(
                indices=self.part.indices.to(device), positions=self.part.positions.to(device)
            )
        return self.part

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The local tensor of the weight, and the granules in it."""
        return _shards.local(self.stored()), self.here().indices

    def entries(self, site: Site, whole: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """All values, as entries of this rank's part of the weight: granule, tensor, indices, entries.

        Also those of what FSDP has gathered, if it has: that would be computed with otherwise.
        """
        part = self.here()
        yield part.granule, _shards.local(self.stored()), part.indices, part.of(whole)
        owner = self.owner()
        held = None if owner is None else owner._parameters.get(self.attribute)
        if held is None or held is self.weight():
            return
        if _shards.is_dtensor(held):
            computed = self._computed((held.device_mesh, tuple(held.placements)), self.everywhere(site))
            local = _shards.local(held)
            yield computed.granule, local, computed.indices, computed.of(whole).to(local.dtype)
        else:
            yield self.granule, held.detach(), self.everywhere(site), whole.to(held.dtype)

    def _computed(self, layout: Layout, indices: Tensor) -> _shards.Part:
        """The part of the adapter in the box with which this rank computes."""
        assert layout is not None
        mesh, placements = layout
        key = mesh, placements, indices.device
        if key not in self._parts:
            coordinate = mesh.get_coordinate()
            assert coordinate is not None
            shape = tuple(self.stored().shape)
            box = _shards.box_of(shape, tuple(mesh.shape), coordinate, placements)
            self._parts[key] = box.take(indices, self.granule)
        return self._parts[key]

    # ---- gradients -------------------------------------------------------------------------------------------

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def attach(self, site: Site, rule: str, module: Any, output: Tensor, input: Tensor) -> Any:
        """The layer's output, whose backward pass gives the values their gradient."""
        held: Any = module._parameters[self.attribute]
        layout = (held.device_mesh, tuple(held.placements)) if _shards.is_dtensor(held) else None
        options = _layers.options(rule, module)
        gradient = partial(self._collect, site, layout, rule, options)
        return _Watch.apply(output, self.lead, input.detach(), gradient)  # type: ignore[no-untyped-call]

    def _collect(self, site: Site, layout: Layout, rule: str, options: Any, grad_output: Tensor, input: Tensor) -> None:
        """The gradient of this rank's batch, kept until the end of the backward pass."""
        size, indices = self.ranks.size, self.everywhere(site)
        if layout is None:
            found = _layers.gradient(rule, grad_output, input, indices, self.granule, options)
        else:
            size //= layout[0].size()
            aligned = _shards.aligned(grad_output, input, *layout)
            part = self._computed(layout, indices)
            if aligned is None or not part.indices.numel():
                found = torch.zeros(self.count, dtype=site.dtype, device=indices.device)
            else:
                found = _layers.gradient(rule, *aligned, part.indices, part.granule, options)
                found = part.into(found, self.count)
        factor = None if self.fsdp is None else self.fsdp.gradient_divide_factor
        self._keep(site, found.to(site.dtype).div_(size if factor is None else factor))

    def gathered(self, site: Site, grad: Any) -> None:
        """Keep the mask's entries of the dense gradient that torch has made of this rank's part of the weight. It holds
        what all ranks have computed, as in any training without a tuner."""
        weight: Any = self.stored()
        if grad.placements != weight.placements:
            grad = grad.redistribute(weight.device_mesh, weight.placements)
        part = self.here()
        found = shira_ops.gather(_shards.local(grad).contiguous(), part.indices, granule=part.granule)
        found = part.into(found.to(site.dtype), self.count)
        self._keep(site, found if _shards.is_first(weight) else found.zero_())
        if found.device.type != "cpu":  # FSDP reduces in a stream of its own
            self.made = torch.accelerator.current_stream().record_event()

    def _keep(self, site: Site, found: Tensor) -> None:
        """Until the end of the backward pass."""
        task = torch._C._current_graph_task_id()
        pending = site.group.pending
        if task not in pending:
            pending[task] = {}
            torch.autograd.Variable._execution_engine.queue_callback(partial(flush, site.group, task))
        before = pending[task].get(site)
        pending[task][site] = found if before is None else before.add_(found)

    def wait(self, found: Tensor) -> None:
        """Let the current stream wait for a gradient of another one."""
        if self.made is not None:
            stream = torch.accelerator.current_stream()
            stream.wait_event(self.made)
            found.record_stream(stream)
            self.made = None

    def base_of_values(self, site: Site) -> Tensor:
        """The base's entries where this rank's values are, in the values' dtype. A collective call, the first time."""
        if self.base is None:
            [self.base] = spread([(self, site.saved.to(site.dtype))])
        return self.base


def spread(items: Sequence[tuple[Sharded, Tensor]]) -> list[Tensor]:
    """From the entries that each rank has in its box (of the values' dtype) to those of its values, bit for bit."""
    wholes = []
    for shard, entries in items:
        words = entries.view(torch.int64 if entries.dtype == torch.float64 else torch.int32)
        if not _shards.is_first(shard.stored()):  # type: ignore[arg-type]
            words = torch.zeros_like(words)
        wholes.append(shard.here().into(words, shard.count))
    if not items:
        return []
    chunks = items[0][0].ranks.add(wholes)
    return [chunk.view(entries.dtype) for chunk, (_, entries) in zip(chunks, items, strict=True)]


class _Watch(torch.autograd.Function):
    """An identity on a layer's output whose backward hands the gradient and the layer's input to a function."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, lead: Tensor, input: Tensor, gradient: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        if input.is_floating_point() and input.dtype != output.dtype:
            input = input.to(output.dtype)
        ctx.save_for_backward(input)
        ctx.gradient = gradient
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _layers.refuse_second_derivative()
        ctx.gradient(grad_output, *ctx.saved_tensors)
        return grad_output, None, None, None


def flush(group: Group, task: int) -> None:
    """At the end of a backward pass: add up the gradients of all ranks, and give each its own."""
    pending = group.pending.pop(task, {})
    sites = [site for site in group.sites if site.shard is not None]
    shards = [site.shard for site in sites if site.shard is not None]
    if not shards:
        return
    ranks = shards[0].ranks
    if not all(shard.compared for shard in shards):
        compare(ranks, {site.name: (shard.everywhere(site), shard.granule, shard.fingerprint)
                        for site, shard in zip(sites, shards, strict=True)})  # fmt: skip
        for shard in shards:
            shard.compared = True
    came = [site in pending for site in sites]
    if any(site.allow_unused for site in sites):  # such a layer may have run on some ranks alone
        came = list(map(bool, ranks.most(came)))
    chosen = [(site, shard) for site, shard, here in zip(sites, shards, came, strict=True) if here]
    zeros = {site: torch.zeros(shard.count, dtype=site.dtype, device=ranks._device) for site, shard in chosen
             if site not in pending}  # fmt: skip
    for site, shard in chosen:
        if site in pending:
            shard.wait(pending[site])
    chunks = ranks.add([pending[site] if site in pending else zeros[site] for site, _ in chosen])
    values = [(site.own_values, chunk, shard.count) for (site, shard), chunk in zip(chosen, chunks, strict=True)]
    with_grad = [(one, chunk, count) for one, chunk, count in values if one is not None and one.requires_grad]
    if with_grad:
        # Through autograd: so it accumulates, and the hooks of the values run, as for any parameter.
        grads = [ranks.values(chunk, count) for _, chunk, count in with_grad]
        with torch.enable_grad():
            given: Tensor = _Give.apply(grads, *(one for one, _, _ in with_grad))  # type: ignore[no-untyped-call]
        given.backward()


class _Give(torch.autograd.Function):
    """A constant whose backward pass gives each of some tensors its gradient of a list, and keeps none of them.

    Autograd copies a gradient to which somebody else still refers, and torch 2.11 makes a whole tensor of a DTensor
    that is divided unevenly when it copies one.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        return _shards.local(tensors[0]).new_zeros(())  # on their device, so that this node has their stream

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(ctx.grads.pop(0) for _ in range(len(ctx.grads)))


# ---- files ---------------------------------------------------------------------------------------------------


def written_by_first(
    shards: Mapping[str, tuple[Sharded, Tensor]],
    write: Callable[[dict[str, tuple[_file.Part, int]]], None],
    where: str,
) -> None:
    """Have the first rank write the values of sharded weights, which it gets when it writes them. A collective call.

    Args:
        shards: by name, how the weight is divided, and this rank's values.
        write: takes what gives the values of each weight, and their fingerprints, as `write_entries` does.
        where: what is written, for the other ranks' error.
    """
    ranks = next(iter(shards.values()))[0].ranks
    dtypes = {name: shard.stored().dtype for name, (shard, _) in shards.items()}
    # As in the file.
    waiting = deque(sorted(shards, key=lambda name: -dtypes[name].itemsize))

    def chunk(name: str) -> Tensor:
        return _shards.local(shards[name][1]).to(dtypes[name])

    def take(name: str) -> list[Any]:
        assert waiting.popleft() == name
        return ranks.to_first(chunk(name), shards[name][0].count)

    words = fingerprints(ranks, [ranks.values(chunk(name), shard.count) for name, (shard, _) in shards.items()])
    parts: dict[str, tuple[_file.Part, int]] = {}
    for (name, (shard, _)), word in zip(shards.items(), words, strict=True):
        known, size = _file.DTYPES[dtype_name(dtypes[name])]
        parts[name] = _file.Part(known, (shard.count,), shard.count * size, partial(take, name)), word
    error: BaseException | None = None
    if ranks.rank == 0:
        try:
            write(parts)
        except BaseException as raised:
            error = raised
    while waiting:
        take(waiting[0])  # the ranks go on together even if nothing is written any more
    told = ranks.told_by_first(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if told is not None:
        raise RuntimeError(f"SparseTuner: the first rank could not write {where}: {told}")


# ---- what the ranks agree on ---------------------------------------------------------------------------------


def compare_plans(ranks: Ranks, names: Sequence[str], mask: Mask) -> None:
    """Refuse ranks that would train different weights, or with other masks. A collective call."""
    version = _version()
    given = (
        ("run different versions of shira", version, version, "install the same one on every rank"),
        ("train different weights", "\n".join(names), _model.some(names), "give every rank the same targets"),
        ("have different masks", repr(mask), repr(mask), "give every rank the same mask"),
    )
    agreed = ranks.same([signed(fnv1a64(text)) for _, text, _, _ in given])
    for (what, _, ours, advice), same in zip(given, agreed, strict=True):
        if not same:
            raise ValueError(f"SparseTuner: the ranks {what}, this one {ours}; {advice}")


def _version() -> str:
    try:
        return metadata.version("shira-ops")
    except metadata.PackageNotFoundError:  # it runs from a folder
        return "that is not installed"


def compare_adapters(ranks: Ranks, adapter: Adapter) -> None:
    """Refuse ranks that would go on with different adapters. A collective call."""
    content = [
        (name, entry.shape, entry.granule, _granules.fingerprint(entry.indices.to(torch.int64)),
         _granules.fingerprint(entry.values))
        for name, entry in adapter.weights.items()
    ]  # fmt: skip
    if not all(ranks.same([signed(fnv1a64(repr((content, adapter.delta))))])):
        raise ValueError("SparseTuner: the ranks have different adapters; give every rank the same file")


def compare(ranks: Ranks, weights: Mapping[str, tuple[Tensor, int, int]]) -> None:
    """Refuse ranks whose masks or bases differ: by indices, granule and the base's fingerprint. A collective call."""
    words = [
        signed(fnv1a64(f"{granule} {_granules.fingerprint(indices.to(torch.int64))} {indices.numel()}"))
        for indices, granule, _ in weights.values()
    ]
    same = ranks.same([*words, *(signed(base) for _, _, base in weights.values())])
    advices = (
        ("masks", "give every rank the same mask: the same seed, or the same tensors", same[: len(weights)]),
        (
            "base weights",
            "load the same base on every rank before the tuner is attached (accelerate's "
            "cpu_ram_efficient_loading loads it on the first one alone)",
            same[len(weights) :],
        ),
    )
    for what, advice, agreed in advices:
        differ = [name for name, one in zip(weights, agreed, strict=True) if not one]
        if differ:
            raise ValueError(f"SparseTuner: the ranks have different {what} for {_model.some(differ)}; {advice}")


def fingerprints(ranks: Ranks, weights: Sequence[DTensor]) -> list[int]:
    """The fingerprints of whole weights. A collective call."""
    words, splits = [], []
    for weight in weights:
        first = _shards.is_first(weight)
        word = _shards.fingerprint(_shards.local(weight), _shards.Box.of(weight)) if first else 0
        words.append(signed(word or 0))
        splits.append(int(word is None))
    added = ranks.sum([*words, *splits])
    found = []
    for weight, word, split in zip(weights, added, added[len(weights) :], strict=False):
        if split:  # a cut goes through a 64-bit word: such weights are small and odd
            found.append(_granules.fingerprint(_whole(weight)))
        else:
            found.append(word & _granules.WORD)
    return found
