"""The names and weights of a model, as both the tuner and the switcher need them."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shira import _shards
from shira._text import clean as clean
from shira._text import some as some

# A tuner registers the trainable values and their indices on the weight's module, under the weight's name plus these.
VALUES_SUFFIX, INDICES_SUFFIX = "_shira_values", "_shira_indices"


def unwrap(model: nn.Module) -> nn.Module:
    """The module under the wrappers of ``torch.compile``, DataParallel and DistributedDataParallel, in any order.

    Its parameters have the names that files use. Refuses FullyShardedDataParallel, which replaces parameters.
    """
    inner: object = model
    while isinstance(inner, nn.Module):
        if _is_fsdp1(inner):
            raise TypeError(
                "model is wrapped in FullyShardedDataParallel, which replaces the parameters by flat ones; wrap it "
                "with torch.distributed.fsdp.fully_shard instead, or use the model before it is wrapped"
            )
        if "_orig_mod" in inner._modules:
            inner = inner._modules["_orig_mod"]
        elif isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        else:
            return inner
    # Pipelines of diffusers and transformers hold models.
    inside = {name: one for name, one in getattr(inner, "__dict__", {}).items() if isinstance(one, nn.Module)}
    largest = max(inside, key=lambda name: sum(p.numel() for p in inside[name].parameters()), default=None)
    advice = "" if largest is None else f"; give its module, such as pipeline.{largest}"
    raise TypeError(f"model must be a torch.nn.Module, got {type(inner).__name__}{advice}")


def _is_fsdp1(module: nn.Module) -> bool:
    # Whoever made one has imported it; importing it here would cost a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def held(module: nn.Module, attribute: str) -> Tensor | None:
    """The module's parameter or buffer of this name, if it has one."""
    # A TorchScript module's are not dictionaries, and have no get().
    for home in (module._parameters, module._buffers):
        if attribute in home and (found := home[attribute]) is not None:
            return found
    return None


def offloaded(module: nn.Module, attribute: str) -> tuple[Tensor, torch.device] | None:
    """The content of a weight that is on the meta device while its module does not run, and the device it runs on.

    The accelerate library keeps it so, in host memory or on disk (cpu_offload, disk_offload, device_map=). None where
    it does not.
    """
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        try:
            found: Tensor = one.weights_map[attribute]
        except (AttributeError, KeyError, TypeError):  # another kind of hook, or one that keeps nothing
            continue
        device: Any = one.execution_device
        return found, torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return None


def absent(slot: Slot, way_out: str = "") -> str | None:
    """Why a weight has no content that could be written, as the rest of a sentence after its name; or None.

    Args:
        way_out: what else can be done with one that is offloaded than loading it in another way.
    """
    if not _shards.local(slot.weight).is_meta:
        return None
    if offloaded(slot.module, slot.attribute) is None:
        return "is on the meta device, so it has no content"
    return (
        f"is offloaded: accelerate keeps it elsewhere while its layer does not run; load the model without "
        f"offloading{way_out}"
    )


# What a forward hook, or the function that a partial one calls, has if it needs the layer's own output: it must run
# before all others.
FIRST = "_shira_first"
_F = TypeVar("_F", bound=Callable[..., Any])


def first(hook: _F) -> _F:
    """Mark such a hook, or the function of partial ones."""
    setattr(hook, FIRST, True)
    return hook


def _is_first(hook: Any) -> bool:
    return hasattr(getattr(hook, "func", hook), FIRST)


def keep_first(module: nn.Module) -> None:
    """Put forward hooks that were registered before ours since (``prepend=True``) behind them again."""
    hooks: OrderedDict[int, Any] = module._forward_hooks  # type: ignore[assignment]
    if not hooks or _is_first(next(iter(hooks.values()))):
        return
    for number in reversed([number for number, hook in hooks.items() if _is_first(hook)]):
        hooks.move_to_end(number, last=False)


def check_first(who: str, name: str, module: nn.Module) -> None:
    """Called by a forward hook that must run before all others: refuses those that have run before it all the same.

    They are hooks on all modules, of which torch's own return nothing; and where a graph is compiled, which calls no
    `keep_first`, those that were put before ours. There the refusal breaks the graph, and the layer runs outside of it.
    """
    for hook in _global_forward_hooks.values():
        if not (getattr(hook, "__module__", None) or "").startswith("torch."):
            raise RuntimeError(
                f"{who}: a forward hook of all modules (register_module_forward_hook) runs before the hook of {name}, "
                f"which needs the layer's own output; remove it, or register it on the modules it is for"
            )
    hooks: OrderedDict[int, Any] = module._forward_hooks  # type: ignore[assignment]
    if not _is_first(next(iter(hooks.values()))):
        raise RuntimeError(
            f"{who}: a forward hook of another runs before the hook of {name}, which needs the layer's own output; "
            f"register it without prepend=True"
        )


@dataclass(frozen=True)
class Slot:
    """One place of a model that holds a weight."""

    name: str
    module: nn.Module
    attribute: str
    weight: nn.Parameter  # or a buffer, where `slots` was asked for them

    @property
    def values_names(self) -> tuple[str, ...]:
        """What tuners that train the weight call their values, on the module."""
        return (self.attribute + VALUES_SUFFIX,)

    @property
    def tuned(self) -> bool:
        """Whether a tuner trains the weight."""
        parameters = self.module._parameters
        return any(name in parameters for name in self.values_names)

    def now(self) -> Tensor | None:
        """What the place holds now."""
        return held(self.module, self.attribute)

    def holds(self) -> bool:
        """Whether the place still holds the parameter it held when it was found."""
        return self.now() is self.weight


def slots(model: nn.Module, *, buffers: bool = False) -> dict[str, Slot]:
    """Every parameter of the model under every one of its names, in the model's order; and the persistent buffers,
    such as a BatchNorm's running statistics, where they are asked for."""
    found: dict[str, Slot] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        there: dict[str, Any] = dict(module._parameters)
        if buffers:
            passing = module._non_persistent_buffers_set
            there |= {name: buffer for name, buffer in module._buffers.items() if name not in passing}
        for attribute, weight in there.items():
            if weight is not None:
                name = clean(f"{prefix}.{attribute}" if prefix else attribute)
                found[name] = Slot(name, module, attribute, weight)
    return found


def gone(model: nn.Module, places: Iterable[Slot]) -> list[str]:
    """The names of places whose module is not in the model any more. Walks over the whole model."""
    there = set(map(id, model.modules()))
    return [place.name for place in places if id(place.module) not in there]


def memory(weight: Tensor) -> object:
    """A key that is equal for two weights exactly when they are one, by identity or by the memory they share.

    The memory of a DTensor is that of its local tensor; one that has none is told by identity.
    """
    if isinstance(weight, UninitializedParameter):
        return id(weight)
    here = _shards.local(weight)
    if foreign(here) is not None or not here.data_ptr() or (here is not weight and not here.numel()):
        return id(weight)
    return here.device, here.data_ptr(), here.numel()


def stride_advice(name: str, weight: Tensor) -> str:
    """What to do with a weight whose memory is not in row-major order."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if channels_last is not None and weight.is_contiguous(memory_format=channels_last):
        return "make it so with model.to(memory_format=torch.contiguous_format), which does the whole model"
    get = f"model.get_parameter({name!r})"
    return f"make it so with {get}.data = {get}.data.contiguous()"


def foreign(weight: Tensor) -> str | None:
    """Why the ops cannot read and write this tensor's own memory, as the rest of a sentence after its name; or None.

    The tuner, the switcher, masks and differences share this text. A tensor subclass that wraps other tensors (torchao,
    optimum-quanto, DTensor) has no memory of its own; one that merely adds attributes does.
    """
    if _shards.is_dtensor(weight):
        return f"is sharded (a DTensor with placements {tuple(weight.placements)}), which is not supported yet"
    if is_partitioned(weight):
        return (
            "is partitioned by DeepSpeed's ZeRO-3, which leaves it empty between its uses; take ZeRO-1 or ZeRO-2, or "
            "shard the model with torch.distributed.fsdp.fully_shard"
        )
    wrapped: bool = is_traceable_wrapper_subclass(weight)
    if wrapped:
        return (
            f"is a {type(weight).__name__}, a tensor that wraps others (quantized?), so its entries cannot be changed "
            f"in place; leave it out, or use the model before it was converted"
        )
    if weight.layout != torch.strided:
        return f"must be dense, got {weight.layout}"
    return None


def is_partitioned(weight: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has the weight: by the attributes that it gives to every parameter."""
    return "ds_id" in weight.__dict__


def overlaps(weights: Iterable[Slot]) -> list[tuple[Slot, Slot]]:
    """Pairs of different weights whose memory overlaps, such as a fused projection and a view of its first rows.

    One weight under several names is not an overlap: see `memory`.
    """
    spans = []
    for slot in weights:
        if isinstance(slot.weight, UninitializedParameter):
            continue
        weight = _shards.local(slot.weight)
        if foreign(weight) is not None or not weight.numel():
            continue
        if weight.is_meta or not weight.data_ptr():
            continue
        extent = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
        start = weight.data_ptr()
        spans.append((str(weight.device), start, start + extent * weight.element_size(), slot))
    spans.sort(key=lambda span: span[:3])
    found: list[tuple[Slot, Slot]] = []
    reaching: tuple[str, int, int, Slot] | None = None  # the one that reaches farthest so far
    for span in spans:
        if reaching is not None and reaching[0] == span[0] and span[1] < reaching[2]:
            if memory(reaching[3].weight) != memory(span[3].weight):
                found.append((reaching[3], span[3]))
            if span[2] <= reaching[2]:
                continue
        reaching = span
    return found


def read_only(weights: Iterable[Slot]) -> list[Slot]:
    """Those in memory that this process may only read, where a write would end it: a file that NumPy has mapped with
    mode "r", say. Linux alone tells; elsewhere none are found."""
    # torch's own memory can be written to; storage that it was given, or mapped, is not resizable.
    given = [(slot, here) for slot in weights if _is_given(here := _shards.local(slot.weight))]
    if not given or not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        lines = [line.split(maxsplit=2)[:2] for line in file]
    sealed = [tuple(int(end, 16) for end in span.split("-")) for span, mode in lines if mode[1] != "w"]
    ends = [end for _, end in sealed]
    found = []
    for slot, here in given:
        start = here.data_ptr()
        # The first that ends behind the weight's first byte.
        at = bisect_right(ends, start)
        if at < len(sealed) and sealed[at][0] < start + here.numel() * here.element_size():
            found.append(slot)
    return found


def read_only_advice(slot: Slot) -> str:
    """The rest of a sentence about a weight that `read_only` has found."""
    get = f"model.get_parameter({slot.name!r})"
    return (
        f"lies in memory that this process may only read, such as a file mapped with mode 'r'; give it memory of its "
        f"own with {get}.data = {get}.data.clone()"
    )


def _is_given(weight: Tensor) -> bool:
    if isinstance(weight, UninitializedParameter) or foreign(weight) is not None:
        return False
    if weight.device.type != "cpu" or not weight.numel() or not weight.is_contiguous():
        return False
    return bool(weight.data_ptr()) and not weight.untyped_storage().resizable()
