"""`DoRATuner`: a weight's DoRA, of which only the entries of a mask reach the weight (SHiRA-DoRA).

The values of a `SparseTuner` are its parameters. Here they are made from others instead: a magnitude for every output
of the layer, and two factors of a matrix of low rank. At the mask, the weight holds what DoRA would hold there::

    values = (magnitude / norm)[i] * (base[i, j] + (B @ A)[i, j])

and everywhere else it holds the base. So what is trained ends in an adapter like any other.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import shira_ops
from shira import _granules, _linears, _live, _shards
from shira._model import VALUES_SUFFIX
from shira.masks.masks import Mask, WeightMagnitude
from shira.train import _hooks, _ranks
from shira.train._sites import Target, check_reached, look_outside, refuse_replaced, refuse_transforms, trained_as
from shira.train.tuner import SparseTuner

__all__ = ["DoRATuner"]

# What the parameters of a weight are called on its module, after the weight's own name: values of a tuner, which other
# tuners leave alone.
_NAMES = tuple(f"_{part}{VALUES_SUFFIX}" for part in ("magnitude", "a", "b"))


class _Product(torch.autograd.Function):
    """The entries of ``B @ A`` at the indices, from ``B.T`` ``[rank, out]`` and ``A`` ``[rank, in]``.

    The product itself is never made, nor is its gradient.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, indices: Tensor, granule: int) -> Tensor:
        ctx.save_for_backward(rows, columns, indices)
        ctx.granule = granule
        return shira_ops.sampled_grad(rows, columns, indices, granule=granule)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns, indices = ctx.saved_tensors
        grad, common = grad.contiguous(), {"granule": ctx.granule}
        to_rows = shira_ops.sparse_linear(columns, indices, grad, rows.shape[1], **common)
        to_columns = shira_ops.sparse_linear(rows, indices, grad, columns.shape[1], transposed=True, **common)
        return to_rows, to_columns, None, None


@dataclass(eq=False)
class _DoRA:
    """What the values of one weight are made from."""

    target: Target
    # Whether the rows of the weight are the layer's inputs, as in transformers' Conv1D.
    turned: bool
    # The norm of base + B @ A for each output, and of which state of the parameters it and the values are.
    norm: Tensor
    # The parameters that it was made with; the module may have others by now.
    own: tuple[nn.Parameter, ...]
    made_of: list[tuple[int, ...]] = field(default_factory=list)

    def state(self) -> list[tuple[int, ...]]:
        """By memory and version, and on a CPU by content too, since many writes do not move a version."""
        parameters = self.parameters()
        content = [_granules.fingerprint(p) if p.device.type == "cpu" else 0 for p in parameters]
        return [(p.data_ptr(), p._version, word) for p, word in zip(parameters, content, strict=True)]

    def parameters(self) -> list[nn.Parameter]:
        owner = self.target.module()
        return [getattr(owner, self.target.site.attribute + name) for name in _NAMES]

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two factors whose product has the layout of the weight: ``[rank, rows]`` and ``[rank, columns]``."""
        _, a, b = self.parameters()
        return (a, b) if self.turned else (b, a)

    def values(self) -> Tensor:
        """DoRA's entries at the mask. Differentiable in the parameters; the norm counts as a constant."""
        weight, indices, values = self.target.tensors()
        site, width = self.target.site, weight.shape[1]
        rows, columns = self.factors()
        product = _Product.apply(rows, columns, indices, site.granule)  # type: ignore[no-untyped-call]
        scale = self.parameters()[0] / self.norm
        first = indices.to(torch.int64) * site.granule
        entries = (first[:, None] + torch.arange(site.granule, device=first.device)).view(-1)
        outputs = entries % width if self.turned else entries // width
        base = site.saved.to(device=values.device, dtype=values.dtype)
        made: Tensor = scale[outputs] * (base + product)
        return made

    @torch.no_grad()
    def measure(self) -> None:
        """Take the norms of ``base + B @ A``, for which that matrix is made once."""
        weight, indices, values = self.target.tensors()
        site = self.target.site
        rows, columns = self.factors()
        whole = weight.to(values.dtype, copy=True)
        base = site.saved.to(device=values.device, dtype=values.dtype)
        shira_ops.scatter_(whole, indices, base, granule=site.granule)
        whole.addmm_(rows.t(), columns)
        self.norm = torch.linalg.vector_norm(whole, dim=0 if self.turned else 1)
        self.made_of = self.state()


class DoRATuner(SparseTuner):
    """Train DoRA, of which only the entries that a mask selects reach the weights: SHiRA-DoRA.

    The paper (arXiv 2406.13175, in its results on LLaMA-7B) masks a DoRA of high rank by the largest 1 % of a weight's
    entries: 6.25 % of the parameters are trained and 1 % changed. It gives no formula; this is the plain reading. With
    DoRA's (arXiv 2402.09353) magnitude ``m`` ``[out]`` and factors ``B`` ``[out, rank]`` and ``A`` ``[rank, in]``, a
    weight ``W`` ``[out, in]`` holds, at the mask's entries alone::

        m[i] * (W + B @ A)[i, j] / norm(W + B @ A)[i]

    with the norm of each output's row, and ``W`` everywhere else. ``m`` starts at the norms of ``W``, ``A`` as in
    ``nn.Linear`` and ``B`` at zero: so training starts at the base, bit for bit. As in DoRA's section 4.3 the norm is a
    constant to autograd. `adapter` gives an ordinary adapter of the mask's entries, for any Switcher.

    It is used as `SparseTuner` is, with any loop and optimizer, `shira.Trainer`, ``transformers.Trainer`` and DDP:
    `parameters` are ``m``, ``A`` and ``B`` of each weight, registered on the weight's module. `nnz` is the number of
    entries that change. Sharded weights and DeepSpeed are refused. Training goes on from `state_dict`, not from an
    adapter's file, which does not hold the factors.

    Memory: ``rank * (in + out) + out`` parameters a weight in fp32 (fp64 for fp64), with their gradients and moments,
    whatever the mask; the values besides; and after each step, for the norms, one dense ``W + B @ A`` in fp32 of one
    weight at a time. A backward pass computes at the mask alone. The norms are sums of torch's own, with the same bits
    for the same device and number of threads.

    Args:
        model, targets, exclude, gradient, calibration, loss, allow_unused: as for `SparseTuner`. Targets must be
            weights of ``nn.Linear`` or transformers' ``Conv1D``, float and not sharded.
        mask: as for `SparseTuner`; None is the paper's, ``shira.masks.WeightMagnitude(density=0.01)``.
        rank: of ``B @ A``. 6.25 % of the parameters of a square weight of ``n`` rows is ``rank = n / 32``.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: Mask | Mapping[str, Tensor] | Callable[[str, Tensor], Tensor] | None = None,
        targets: str | Sequence[str] | None = None,
        *,
        rank: int = 32,
        exclude: str | Sequence[str] | None = None,
        gradient: Literal["sampled", "dense"] = "sampled",
        calibration: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        allow_unused: bool = False,
    ) -> None:
        if type(rank) is not int or rank < 1:
            raise ValueError(f"DoRATuner: rank must be a whole number of at least 1, got {rank!r}")
        self._doras: dict[str, _DoRA] = {}
        self._started = False
        # The backward pass from values to what they are made of is running; and an optimizer has stepped in it.
        self._passing = self._stepped = False
        super().__init__(
            model, WeightMagnitude(density=0.01) if mask is None else mask, targets, exclude=exclude,
            gradient=gradient, calibration=calibration, loss=loss, allow_unused=allow_unused,
        )  # fmt: skip
        try:
            self._make(rank)
        except BaseException:
            self.detach()
            raise

    @classmethod
    def from_adapter(cls, *args: Any, **options: Any) -> NoReturn:
        """Refused: an adapter holds the entries and not what DoRA makes them from."""
        raise TypeError(
            "DoRATuner: an adapter does not hold the magnitudes and factors that its entries were made from; go on "
            "with tuner.state_dict(), or train the entries themselves with SparseTuner.from_adapter"
        )

    def _make(self, rank: int) -> None:
        """Put the parameters on the model, and the hooks that make the values of them."""
        if self.sharded:
            self._refuse_sharded(self._tuned[0].name)
        for tuned in self._tuned:
            kinds = {_kind(slot.module) for slot in tuned.plan.slots}
            if len(kinds) != 1 or None in kinds or tuned.plan.slots[0].attribute != "weight":
                module = next((slot.module for slot in tuned.plan.slots if _kind(slot.module) is None), tuned.owner)
                raise ValueError(
                    f"DoRATuner: {tuned.name} is in a {type(module).__name__}, and DoRA is for the weights of "
                    f"nn.Linear and Conv1D; leave it out with exclude="
                )
        for tuned in self._tuned:
            weight, site = tuned.plan.weight, tuned.target.site
            turned = _kind(tuned.owner) == _linears.CONV1D
            outputs, inputs = reversed(weight.shape) if turned else weight.shape
            like: dict[str, Any] = {"dtype": site.dtype, "device": weight.device}
            a, b = torch.empty(rank, inputs, **like), torch.zeros(rank, outputs, **like)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            made = (torch.empty(outputs, **like), a, b)
            own = tuple(map(nn.Parameter, made))
            for name, parameter in zip(_NAMES, own, strict=True):
                tuned.owner.register_parameter(site.attribute + name, parameter)
            site.others = tuple(site.attribute + name for name in _NAMES)
            dora = self._doras[tuned.name] = _DoRA(tuned.target, turned, made[0], own)
            dora.measure()
            if not bool(dora.norm.all()):
                raise ValueError(
                    f"DoRATuner: {tuned.name} has outputs whose weights are all zero, and DoRA gives these no "
                    f"direction; leave it out with exclude="
                )
            with torch.no_grad():
                dora.parameters()[0].copy_(dora.norm)
            dora.made_of = dora.state()
            hook = partial(_pass_on, weakref.ref(self), dora)
            tuned.target.handles.append(tuned.values.register_post_accumulate_grad_hook(hook))
        self._ignored += _ranks.ignore(self.model, [tuned.values for tuned in self._tuned])
        look_outside(_follow)
        # Before the hook that has the weights follow their values.
        self._keep_root(self.model.register_forward_pre_hook(partial(_follow, _Held(self)), prepend=True))
        _hooks.makers.add(self)
        count = sum(p.numel() for p in self.parameters())
        self._notes.append(f"made by DoRA of rank {rank}, with {count:,} parameters to train")

    @staticmethod
    def _refuse_sharded(name: str) -> NoReturn:
        raise ValueError(f"DoRATuner: {name} is sharded, and its norms would need the whole weight; use SparseTuner")

    # ---- while it trains -------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The magnitude ``[out]``, ``A`` ``[rank, in]`` and ``B.T`` ``[rank, out]`` of each weight."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same under their names in the model."""
        for tuned in self._attached():
            made = zip(_NAMES, self._doras[tuned.name].parameters(), strict=True)
            yield from ((tuned.name + name, parameter) for name, parameter in made)

    def _trained(self) -> Iterator[nn.Parameter]:
        yield from super()._trained()
        yield from self.parameters()

    def sync(self) -> None:
        """Make the values of the parameters, if these have changed, and write them into the weights.

        Steps of optimizers do so by themselves. After any other edit the next forward of the model does, unless the
        edit moves no version counter (through ``.data``, on a GPU).
        """
        self._enabled("sync")
        self._refuse_replaced()
        self._renew()
        super().sync()

    def _refuse_replaced(self) -> None:
        """Refuse to train where the module has other parameters than those that the optimizer has."""
        for name, dora in self._doras.items():
            for key, held, own in zip(_NAMES, dora.parameters(), dora.own, strict=True):
                if held is not own:
                    self._take_over()
                    refuse_replaced(name + key)

    def _is_stale(self) -> bool:
        return any(dora.made_of != dora.state() for dora in self._doras.values())

    @torch.no_grad()
    def _renew(self) -> None:
        for name, dora in self._doras.items():
            # The values train where what they are made of does.
            dora.target.trained()[1].requires_grad_(any(parameter.requires_grad for parameter in dora.parameters()))
            if any(_ranks.engine_of(parameter) is not None for parameter in dora.parameters()):
                raise RuntimeError(
                    f"DoRATuner: a DeepSpeed engine trains what {name} is made of, and its steps cannot be followed; "
                    f"use DDP, or SparseTuner"
                )
            if dora.made_of != dora.state():
                dora.measure()
                dora.target.trained()[1].copy_(dora.values())

    def state_dict(self) -> dict[str, Any]:
        """The parameters and the values, and what they belong to; see `SparseTuner.state_dict`."""
        self._attached()
        self._renew()  # so that the values are those of the parameters, whatever edited them
        state = super().state_dict()
        for name, dora in self._doras.items():
            made = zip(_NAMES, dora.parameters(), strict=True)
            state["weights"][name] |= {key: parameter.detach().clone() for key, parameter in made}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the parameters of a `state_dict`. One of another base, mask or rank is refused, with nothing changed."""
        self._enabled("load_state_dict")
        self.check_state_dict(state)
        for name, dora in self._doras.items():
            with torch.no_grad():
                for key, parameter in zip(_NAMES, dora.parameters(), strict=True):
                    parameter.copy_(state["weights"][name][key])
            dora.measure()
        super().load_state_dict(state)

    def check_state_dict(self, state: Any) -> None:
        """Raise the `ValueError` that `load_state_dict` would raise, without taking anything."""
        super().check_state_dict(state)
        for name, dora in self._doras.items():
            for key, parameter in zip(_NAMES, dora.parameters(), strict=True):
                found = state["weights"][name].get(key)
                if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape != parameter.shape:
                    raise ValueError(
                        f"DoRATuner: the state has no {key.removesuffix(VALUES_SUFFIX).strip('_')} of {name} with the "
                        f"shape {list(parameter.shape)} (another rank, or the state of a SparseTuner?)"
                    )

    # ---- steps of optimizers ---------------------------------------------------------------------------------

    def _has(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the parameters; refuses one that has the values without them."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # This runs at the steps of all optimizers there are, in any thread, while this tuner may be coming or going: so
        # what is or may be wrong with this model must not raise here.
        if any(id(p) in held for dora in list(self._doras.values()) for p in dora.own):
            return True
        if any(id(tuned.target.site.own_values) in held for tuned in list(self._tuned)):
            raise RuntimeError(
                f"DoRATuner: this {type(optimizer).__name__} has the values, which are made of other parameters; make "
                f"it from tuner.parameters()"
            )
        return False

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before the steps of all optimizers."""
        if not self._has(optimizer):
            return
        self._enabled("an optimizer's step")
        self._refuse_replaced()
        for dora in self._doras.values():
            _hooks.refuse_other(dora.target, dora.target.trained()[1])
        _live.refuse_active(self.model)
        if not self._started:
            self._compare()
        if _hooks.closure_of(args, kwargs) is None and not _hooks.in_backward():
            check_reached(self._group.sites)
        self._started = self._group.served = True

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after the steps of all optimizers."""
        if not self._tuned or not self._has(optimizer):
            return
        if not _hooks.in_backward():
            self.sync()
        elif self._passing:
            self._stepped = True
        else:
            self._sync_after_backward()

    def _sync_after_backward(self) -> None:
        """What is left of the pass needs the weights as they were in the forward."""
        torch.autograd.Variable._execution_engine.queue_callback(self.sync)

    def _compare(self) -> None:
        """Refuse ranks that differ. A collective call."""
        _ranks.compare([
            trained_as(dora.target.site, dora.target.module(), dora.parameters()[0]) for dora in self._doras.values()
        ])  # fmt: skip

    # ---- taking off ------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """A weight that ``fully_shard`` has taken is refused, as one that was sharded before."""
        for tuned in self._tuned:
            held = tuned.owner._parameters.get(tuned.target.site.attribute)
            if held is not tuned.target.site.own_weight and _shards.fsdp_modules(self.model):
                self._refuse_sharded(tuned.name)

    def _take_off(self) -> None:
        super()._take_off()
        _hooks.makers.discard(self)
        self._doras.clear()


def _kind(module: nn.Module) -> str | None:
    """How the weight of a layer is laid out; also if the layer has a forward of its own."""
    known = _linears.kind_of(module)
    if known is None and isinstance(module, nn.Linear):
        return _linears.LINEAR
    return known if _linears.is_linear(module) else None


class _Held:
    """Keeps the tuner alive for the hook of its model. A copy of the model has none, be it unpickled elsewhere."""

    def __init__(self, tuner: DoRATuner | None = None) -> None:
        self.tuner = tuner

    def __reduce__(self) -> Any:
        if self.tuner is not None and self.tuner._is_stale():
            raise RuntimeError(
                "DoRATuner: its parameters were edited, and a copy of the model would not follow that; call "
                "tuner.sync() before the model is copied or pickled"
            )
        return _Held, ()


def _pass_on(tuner: weakref.ref[DoRATuner], dora: _DoRA, values: Tensor) -> None:
    """The hook of values that have just got a gradient: pass it on to what they are made of."""
    dora.target.site.note(values)
    grad, values.grad = values.grad, None
    found = tuner()
    if grad is None or found is None:
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "DoRATuner: its gradients cannot be differentiated again (create_graph=True): what the values are made of "
            'gets them in a backward pass of its own; use SparseTuner(..., gradient="dense")'
        )
    if dora.made_of != dora.state():
        raise RuntimeError(
            f"DoRATuner: what {dora.target.site.name} is made of was changed between the forward and the backward "
            f"pass, so this gradient would be of neither state; change it after backward, or run the forward again"
        )
    with torch.enable_grad():
        made = dora.values()
    # Through autograd: so it accumulates, and the hooks of DDP run, as for any parameter.
    found._passing = True
    try:
        torch.autograd.backward(made, grad.detach())
    finally:
        found._passing, stepped, found._stepped = False, found._stepped, False
    if stepped:  # only now, since what the pass above queues is called at its own end
        found._sync_after_backward()


def _follow(held: _Held, module: nn.Module, args: tuple[Any, ...]) -> None:
    """The forward pre-hook of the model: make the values of parameters that were edited."""
    found = held.tuner
    if found is None or module is not found.model:
        if torch.is_grad_enabled() and module.training:
            raise RuntimeError(
                "DoRATuner: this is a copy of the model that it trains, and a copy would train the values and not what "
                "they are made of; use the copy in eval() or under torch.no_grad(), or shira.detach(copy) and tune it"
            )
        return
    if found._disabled:
        return
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "DoRATuner: an export would hold the weights as they are now, and not follow what they are made of; export "
            "after tuner.detach(), with the adapter put on by a Switcher"
        )
    # Where the model is traced into the graph of something else, the graph breaks here.
    (_renew_outside if "torch._dynamo" in sys.modules else _renew)(found)


def _renew(tuner: DoRATuner) -> None:
    refuse_transforms()
    if torch.is_grad_enabled():
        tuner._refuse_replaced()
    tuner._renew()


_renew_outside = torch._disable_dynamo(_renew)  # type: ignore[attr-defined]
