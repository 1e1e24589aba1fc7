"""``model(..., adapter_names=["style", "__base__"])``: an adapter for each sample of a batch, as PEFT's LoRA has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"
"""PEFT's name for a sample that gets no adapter."""


class MixedBatches:
    """A tuner whose layers take ``adapter_names``. PEFT's own tuner, except LoRA's, drops the argument silently."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        # PEFT calls this around forward and generate, by this name.
        with ExitStack() as hooks:
            for module, own in self._samples(names, kwargs):

                def give(module: nn.Module, args: Any, kwargs: Any, own: Any = own) -> Any:
                    return args, {**kwargs, "adapter_names": own}

                hooks.callback(module.register_forward_pre_hook(give, with_kwargs=True).remove)
            yield

    def _samples(self, names: Any, kwargs: dict[str, Any]) -> list[tuple[nn.Module, list[str]]]:
        """The modules that want to know the adapters of their samples, and those; refuses what cannot be meant."""
        tuner: Any = self
        if tuner.training:
            raise ValueError("adapter_names: the model must be in eval mode; call model.eval()")
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"adapter_names: must be a list of names, one for each sample, got {names!r:.80}")
        there: set[str] = set()
        modules = [one for one in tuner.modules() if isinstance(one, (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper))]
        for module in modules:
            if isinstance(module, BaseTunerLayer):
                there |= module._get_available_adapters()
        strange = sorted(set(names) - there - {BASE})
        if strange:
            raise ValueError(
                f"adapter_names: there is no adapter {', '.join(map(repr, strange))}; there are "
                f"{', '.join(map(repr, sorted(there)))}, and {BASE!r} for none"
            )
        # Generating with beams, or for several results, repeats each sample. An encoder sees them once.
        repeated = [name for name in names for _ in range(_copies(kwargs))]
        encoder = tuner.model.get_encoder() if hasattr(tuner.model, "get_encoder") else None
        encoding = set() if encoder is None or encoder is tuner.model else set(encoder.modules())
        return [(module, list(names) if module in encoding else repeated) for module in modules]


def _copies(kwargs: dict[str, Any]) -> int:
    """How often ``generate`` with these arguments repeats each sample; 1 in forward."""
    config = kwargs.get("generation_config")
    counts = [1]
    for what in ("num_beams", "num_return_sequences"):
        given = kwargs.get(what)
        given = getattr(config, what, None) if given is None else given
        counts += [given] if isinstance(given, int) else []
    return max(counts)


def check_samples(layer: Any, input: Tensor, names: Sequence[str]) -> None:
    """Refuse an input that does not have one sample for each name, and a layer whose weight holds adapters."""
    if layer.merged:
        raise ValueError("adapter_names: adapters are merged into the weights; call model.unmerge_adapter() first")
    if input.dim() < 2 or len(input) != len(names):
        raise ValueError(
            f"adapter_names: must have one name for each sample, got {len(names)} names and an input of shape "
            f"{list(input.shape)}"
        )
