"""Gradients summed over the batches of a calibration set, one weight at a time.

The masks Grad and Snip (arXiv 2406.13175, section 3.1) need, for every targeted weight, the gradient of the loss summed
over all calibration batches: signed, in fp32 (fp64 for fp64 weights). `stream` computes it with little memory:

- The backward pass makes no gradient for weights of ``nn.Linear`` and of quantized layers. A forward hook keeps the
  factors of the gradient, a batch's ``grad_output`` and ``input``, ``[tokens, m]`` and ``[tokens, n]``. The gradient is
  ``sum over batches of grad_output^T @ input``: products in the layer's dtype, as in autograd, and the sum in fp32. The
  factors are kept while they are no larger than that sum; beyond that they are multiplied, added to an fp32 accumulator
  of the weight's shape, and freed.
- Any other weight (convolutions, embeddings, subclasses of ``nn.Linear``, plain parameters) gets autograd's dense
  gradient, which a hook of the parameter adds into an fp32 accumulator and frees at once.
- In the backward pass of the last batch a weight's gradient is finished, passed to ``visit`` and freed as soon as its
  last contribution is there. So with one batch there is never more than one dense gradient at a time, and with several
  batches never more than one besides the accumulators.

Weights that FSDP2, tensor parallelism or both divide between ranks take part where their layers are ``nn.Linear``:
after every backward pass of such a layer its product is added up over the ranks, which keep their part of the sum. So
the gradient is that of the batches of all ranks, and a rank never keeps more than its part of it. All ranks run equally
many batches; the ranks that compute a layer together by tensor parallelism run the same ones.

Afterwards the model is unchanged: parameters, their ``.grad`` and ``requires_grad``, modes, buffers, what else modules
have as numbers, texts or None, and torch's random state. The model runs in its current mode: call ``model.eval()``
first for gradients without dropout and with the running statistics of batch normalisation. In training mode it uses the
batch's statistics, and the running ones are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shira import _linears, _loss, _model, _shards

__all__ = ["Loss", "Visit", "stream"]

Loss = Callable[[nn.Module, Any], Tensor]
Visit = Callable[[str, Tensor], None]

_END = object()
# How many rows of a narrow gradient are made at a time before they are added in fp32.
_ROWS = 512


def stream(
    model: nn.Module,
    weights: Mapping[str, Sequence[tuple[nn.Module, str]]],
    batches: Iterable[Any],
    loss: Loss | None,
    visit: Visit,
) -> None:
    """Run the batches and call ``visit(name, gradient)`` once for each weight, in no particular order.

    Args:
        model: the model to call. Its state is restored afterwards, also after an error.
        weights: a weight's name to every place that holds it, as (module, attribute).
        batches: iterated once. The model is called with each batch: a mapping as ``model(**batch)``, a tuple or
            list as ``model(*batch)``, a tensor as ``model(batch)``.
        loss: ``loss(model, batch)`` gives the scalar; None: the model's ``output.loss`` or ``output["loss"]``, or its
            output if that is a scalar.
        visit: gets the gradient, of the weight's shape, in fp32 (fp64 for fp64 weights), which is freed afterwards. Of
            a sharded weight it is a DTensor, divided as the weight is, and all ranks come here together.

    Raises:
        ValueError: a weight is sparse, wraps other tensors, or is sharded in a layer other than nn.Linear; there are no
            batches, or a batch gives no scalar loss that depends on the weights.
        RuntimeError: a weight got no gradient, or one that is not finite; the error names it.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"calibration must be batches, as a list or a DataLoader, got one {type(batches).__name__}; "
            f"put it in a list"
        )
    layers = {name: _quantized(name, *places[0]) for name, places in weights.items()}
    for name, places in weights.items():
        if layers[name] is not None:
            continue
        weight = getattr(*places[0])
        if _shards.is_dtensor(weight) and all(map(_is_linear, places)):
            continue
        foreign = _model.foreign(weight)
        if foreign is not None:
            raise ValueError(f"calibration: {name} {foreign}")
    gradients: dict[str, _Gradient] = {}
    for name, places in weights.items():
        layer = layers[name]
        weight = getattr(*places[0]) if layer is None else layer.stand_in()
        kind = _ShardedGradient if _shards.is_dtensor(weight) else _Gradient
        gradients[name] = kind(name, weight)
    run = _Run(gradients, visit, {name for name, layer in layers.items() if layer is not None})
    with _untouched(model), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with run.hooked(weights):
            run.batches(model, batches, loss or _loss.loss_of_model)


def dense(name: str, module: nn.Module, attribute: str) -> Tensor:
    """The weight of this name; of a quantized layer, the dequantized one."""
    layer = _quantized(name, module, attribute)
    weight: Tensor = getattr(module, attribute).detach() if layer is None else layer.dense()
    return weight


def _quantized(name: str, module: nn.Module, attribute: str) -> _linears.Layer | None:
    layer = _linears.of(name, module) if attribute == "weight" else None
    return layer if layer is not None and layer.quantized else None


@dataclass(eq=False)
class _Gradient:
    """The gradient of one weight, as far as it has been computed.

    Of a quantized layer, ``weight`` has only the shape, dtype and device.
    """

    name: str
    weight: Tensor
    # Its factors, not yet multiplied: grad_output, input, and their versions.
    pairs: list[tuple[Tensor, Tensor, tuple[int, int]]] = field(default_factory=list)
    total: Tensor | None = None
    reached: bool = False
    visited: bool = False
    expected: int = 0  # forward calls of this batch that still await their backward

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    @property
    def shape(self) -> Sequence[int]:
        """The shape of what is summed up."""
        return self.weight.shape

    def computed_by(self, module: nn.Module) -> None:
        """Called before each call of the linear layer."""

    def of_layer(self, grad_output: Tensor, input: Tensor, keep: bool) -> None:
        """Adds a call of the linear layer. Its factors are kept for later if that is allowed and they are small."""
        rows, columns = self.shape
        self._contribution()
        size = sum(_bytes(g) + _bytes(x) for g, x, _ in self.pairs) + _bytes(grad_output) + _bytes(input)
        keep = keep and self.total is None and size <= self.weight.numel() * self.dtype.itemsize
        # A tensor without a grad_fn may be the caller's batch, whose memory may be reused for the next one.
        g = _own(grad_output, rows) if keep else grad_output.reshape(-1, rows)
        x = _own(input, columns, borrowed=input.grad_fn is None) if keep else input.reshape(-1, columns)
        self.pairs.append((g, x, (g._version, x._version)))
        if not keep:
            self._multiply()

    def of_parameter(self, grad: Tensor) -> None:
        """Adds a gradient that autograd made."""
        self._contribution()
        if self.total is None and grad.dtype == self.dtype and not grad.is_sparse and grad.is_contiguous():
            self.total = grad
        else:
            self._accumulator().add_(grad.to(self.dtype))

    def finish(self) -> Tensor:
        """Returns the whole gradient and keeps nothing of it."""
        self._multiply()
        total, self.total = self._accumulator(), None
        self.visited = True
        return total

    def is_finite(self, total: Tensor) -> bool:
        """Whether every entry of the gradient is finite."""
        # If all entries are, their sum almost always is: one cheap pass instead of a mask.
        return bool(total.sum().isfinite()) or bool(total.isfinite().all())

    def _contribution(self) -> None:
        if self.visited:
            raise RuntimeError(
                f"calibration: {self.name} got a gradient after its last use: the backward pass runs it more often "
                f"than the forward pass; checkpoint with use_reentrant=False"
            )
        self.reached = True

    def _accumulator(self) -> Tensor:
        if self.total is None:
            self.total = torch.zeros(self.shape, dtype=self.dtype, device=self.weight.device)
        return self.total

    def _multiply(self) -> None:
        """Multiply the kept factors in one product, add it, and free them."""
        if not self.pairs:
            return
        if any((g._version, x._version) != versions for g, x, versions in self.pairs):
            raise RuntimeError(f"calibration: the input of {self.name} was changed in place after its batch")
        grad_output, input = self.pairs[0][:2]
        if len(self.pairs) > 1:
            grad_output, input = torch.cat([g for g, _, _ in self.pairs]), torch.cat([x for _, x, _ in self.pairs])
        self.pairs = []
        if grad_output.dtype == self.dtype:
            self.total = grad_output.t() @ input if self.total is None else self.total.addmm_(grad_output.t(), input)
            return
        # In the layer's own dtype, as autograd multiplies (in fp32 it took 1.6 times as long on CPU), some rows at a
        # time, and summed in fp32.
        first = self.total is None
        if self.total is None:
            self.total = torch.empty(self.shape, dtype=self.dtype, device=self.weight.device)
        for rows, part in zip(self.total.split(_ROWS), grad_output.split(_ROWS, dim=1), strict=True):
            product = part.t() @ input
            rows.copy_(product) if first else rows.add_(product)


@dataclass(eq=False)
class _ShardedGradient(_Gradient):
    """The gradient of a weight that ranks hold together, of which each keeps the part that it has of the weight.

    Every call of the layer is added up over the ranks at once. All of them run the same layers in the same order.
    """

    # How tensor parallelism divides the weight while its layer computes: mesh and placements; None: not at all.
    layout: tuple[Any, Sequence[Any]] | None = None

    @property
    def shape(self) -> Sequence[int]:
        return self.weight.shape if self.layout is None else self._computed().local_shape

    def computed_by(self, module: nn.Module) -> None:
        held: Any = module.weight
        self.layout = (held.device_mesh, held.placements) if _shards.is_dtensor(held) else None

    def of_layer(self, grad_output: Tensor, input: Tensor, keep: bool) -> None:
        before, self.total = self.total, None
        if self.layout is None:
            super().of_layer(grad_output, input, keep=False)
        elif (parts := _shards.aligned(grad_output, input, *self.layout)) is not None:
            super().of_layer(*parts, keep=False)
        else:  # another rank has made the same
            self._contribution()
        part = self._added(self._accumulator())
        self.total = part if before is None else before.add_(part)

    def _computed(self) -> _shards.Box:
        """The part of the weight with which this rank computes."""
        assert self.layout is not None
        mesh, placements = self.layout
        return _shards.box_of(tuple(self.weight.shape), tuple(mesh.shape), mesh.get_coordinate(), placements)

    def _added(self, own: Tensor) -> Tensor:
        """Of the sum of what all ranks have made, the part of this rank."""
        from torch.distributed.tensor import DTensor, Partial

        weight: Any = self.weight
        mesh, placements = weight.device_mesh, weight.placements
        if self.layout is None:
            every = [Partial()] * mesh.ndim
            return DTensor.from_local(own, mesh, every, run_check=False).redistribute(placements=placements)
        computing, divided = self.layout
        names = range(mesh.ndim) if computing == mesh else computing.mesh_dim_names
        cut = {name for name, placement in zip(names, divided, strict=True) if placement.is_shard()}
        for name in range(mesh.ndim) if computing == mesh else mesh.mesh_dim_names:
            if name not in cut:
                torch.distributed.all_reduce(own, group=mesh.get_group(name))
        part = _shards.Box.of(weight).cut(own, self._computed())
        shape = {"shape": weight.shape, "stride": weight.stride()}
        return DTensor.from_local(part, mesh, placements, run_check=False, **shape)

    def is_finite(self, total: Tensor) -> bool:
        return self.every_rank(super().is_finite(_shards.local(total)))

    def every_rank(self, here: bool) -> bool:
        """Whether something is so on every rank. A collective call."""
        return not self.any_rank(not here)

    def any_rank(self, here: bool) -> bool:
        """Whether something is so on any rank. A collective call."""
        weight: Any = self.weight
        found = torch.tensor(here, dtype=torch.int32, device=_shards.local(weight).device)
        for dim in range(weight.device_mesh.ndim):
            group = weight.device_mesh.get_group(dim)
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
        return bool(found)


def _is_linear(place: tuple[nn.Module, str]) -> bool:
    """Whether it is the weight of a plain linear layer. A subclass may use its weight otherwise than in its forward."""
    module, attribute = place
    if type(module) is not nn.Linear or attribute != "weight":
        return False
    # Where transformers divides a layer, its forward moves the input and output between ranks.
    return not _linears.is_replaced(module) or _shards.is_dtensor(module.weight)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _own(tensor: Tensor, width: int, borrowed: bool = False) -> Tensor:
    """A tensor ``[tokens, width]`` that nobody else writes to, and that does not keep a larger memory alive."""
    flat = tensor.detach().reshape(-1, width)
    whole = flat.is_contiguous() and flat.untyped_storage().nbytes() == _bytes(flat)
    return flat if whole and not borrowed else flat.clone(memory_format=torch.contiguous_format)


class _Tap(torch.autograd.Function):
    """An identity on a linear layer's output whose backward passes on the factors of the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, input: Tensor, tell: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.tell = tell
        return output.detach()  # as in `shira.train._layers.Attach`: an alias, so that an in-place op may follow

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (input,) = ctx.saved_tensors
        ctx.tell(grad_output, input.to(grad_output.dtype))  # autocast gave the layer a cast input
        return grad_output, None, None, None


@dataclass(eq=False)
class _Run:
    """One run over the batches."""

    gradients: dict[str, _Gradient]
    visit: Visit
    # The quantized layers, of which it is known that they compute as nn.Linear does.
    quantized: Collection[str] = ()
    # Makes the layers' outputs require grad where no parameter does. It gets no gradient itself.
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))
    leaves: list[Tensor] = field(default_factory=list)
    last: bool = False
    in_backward: bool = False
    strange_losses: list[str] = field(default_factory=list)

    @contextmanager
    def hooked(self, weights: Mapping[str, Sequence[tuple[nn.Module, str]]]) -> Iterator[None]:
        handles = []
        try:
            self.leaves = [self.anchor]
            for name, places in weights.items():
                gradient = self.gradients[name]
                plain = all(map(_is_linear, places))
                if plain or name in self.quantized:
                    for module, _ in places:
                        # Before all other hooks, which may change the output: this one needs the layer's own.
                        hook = partial(_Run._forward, self, gradient)
                        handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
                else:
                    gradient.weight.requires_grad_(True)
                    self.leaves.append(gradient.weight)
                    hook = partial(self._accumulated, gradient)
                    handles.append(gradient.weight.register_post_accumulate_grad_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batches(self, model: nn.Module, batches: Iterable[Any], loss: Loss) -> None:
        iterator = iter(batches)
        following, number = next(iterator, _END), 0
        if following is _END:
            raise ValueError("calibration has no batches")
        while following is not _END:
            batch, following = following, next(iterator, _END)
            self.last = following is _END
            self._check_ranks(number + 1)
            self._batch(model, batch, loss, number)
            number += 1
        missing = [name for name, gradient in self.gradients.items() if not gradient.reached]
        if missing:
            raise RuntimeError(
                f"calibration: no gradient reached {_model.some(missing)} in {number} batches; the loss must depend on "
                f"every targeted weight: leave those out with targets=, or checkpoint with use_reentrant=False"
            )
        for gradient in self.gradients.values():
            if not gradient.visited:
                self._finish(gradient)

    def _check_ranks(self, number: int) -> None:
        """Refuse ranks of which one has its last batch and another has not: it would wait for ever."""
        sharded = [gradient for gradient in self.gradients.values() if isinstance(gradient, _ShardedGradient)]
        if sharded and sharded[0].any_rank(self.last) and not sharded[0].every_rank(self.last):
            more = "" if self.last else " or more"
            raise ValueError(
                f"calibration: the ranks have different numbers of batches, this one {number}{more}; give every rank "
                f"equally many"
            )

    def _batch(self, model: nn.Module, batch: Any, loss: Loss, number: int) -> None:
        for gradient in self.gradients.values():
            gradient.expected = 0
        value = _loss.scalar(loss(model, batch), f"calibration: the loss of batch {number}")
        if not value.requires_grad:
            raise ValueError(f"calibration: the loss of batch {number} depends on none of the targeted weights")
        if not bool(value.isfinite()):
            self.strange_losses.append(f"the loss of batch {number} is {value.item()}")
        self.in_backward = True
        try:
            value.backward(inputs=self.leaves)
        finally:
            self.in_backward = False

    @_model.first
    def _forward(
        self, gradient: _Gradient, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Any:
        if not torch.is_grad_enabled():
            return None
        _model.check_first("calibration", gradient.name, module)
        gradient.expected += not self.in_backward  # activation checkpointing runs it again in the backward
        gradient.computed_by(module)
        input = args[0] if args else next(iter(kwargs.values()))
        return _Tap.apply(output, self.anchor, input, partial(self._layer, gradient))  # type: ignore[no-untyped-call]

    def _layer(self, gradient: _Gradient, grad_output: Tensor, input: Tensor) -> None:
        gradient.expected -= 1
        done = self.last and gradient.expected == 0
        gradient.of_layer(grad_output, input, keep=not done)
        if done:
            self._finish(gradient)

    def _accumulated(self, gradient: _Gradient, parameter: Tensor) -> None:
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        with torch.no_grad():
            gradient.of_parameter(grad)
            del grad
            if self.last:
                self._finish(gradient)

    def _finish(self, gradient: _Gradient) -> None:
        with torch.no_grad():
            total = gradient.finish()
            if not gradient.is_finite(total):
                why = f" ({_model.some(self.strange_losses)})" if self.strange_losses else ""
                raise RuntimeError(f"calibration: the gradient of {gradient.name} is not finite{why}")
            self.visit(gradient.name, total)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Restores the model and torch's random state afterwards, whatever happens inside.

    Of the modules' attributes those that are numbers, texts or None.
    """
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    # Modes, and what modules remember of their calls, such as the length that a cache in a buffer is for.
    remembered = [(vars(module), dict(filter(_is_plain, vars(module).items()))) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = {parameter.device.index for parameter, _, _ in parameters if parameter.is_cuda}
    try:
        for parameter, _, _ in parameters:
            parameter.grad = None
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for parameter, requires_grad, grad in parameters:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for now, before in remembered:
            now.update((name, value) for name, value in before.items() if now.get(name, value) is not value)
        for module, name, buffer, copy in buffers:
            module._buffers[name] = buffer
            # Compared by content: batch normalisation writes its statistics without moving their version.
            if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                with torch.no_grad():
                    buffer.copy_(copy)


def _is_plain(item: tuple[str, Any]) -> bool:
    return type(item[1]) in (bool, int, float, str, type(None))
