"""What an `Overlay` adds to the outputs of layers: which adapters for which sample, and the sums.

A `Selection` says which adapters every sample of a batch has. A `Hook` on each layer brings a selection, the layer's
input and its output together. Everything that depends on a selection is a tensor, so a compiled model takes the next
selection without being compiled again.
"""

from __future__ import annotations

import copy
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import shira_ops
from shira import _model, _shards
from shira._linears import CONV1D, EMBEDDING, Layer
from shira._live import SwitchError
from shira._text import dtype_name
from shira.serve import _generators
from shira.serve._ledger import quiet

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Strengths = dict[str, float]
"""Adapters and their strengths, in the order in which the adapters were added."""

EXPERTS = re.compile(r"(^|\.)(?!\w*(shared|router|_gate\.))\w*expert\w*\.", re.IGNORECASE)
"""Layers of a mixture of experts, by their names: they get some of the tokens, in an order of their own. Shared experts
and what chooses between experts get them all."""

Division = tuple["DeviceMesh", tuple["Placement", ...]]
"""How a weight is divided between ranks while its layer computes with it."""

_NARROW = (torch.float16, torch.bfloat16)
# How many spread selections are kept: a prompt, its continuation, and a few others.
_MOST_SPREAD = 16


class Shared:
    """What never changes after it is made, so that copies of a model share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


@dataclass(frozen=True, eq=False)
class Delta(Shared):
    """What one adapter adds to one weight, on the weight's device: values in float32 (float64 for float64)."""

    indices: Tensor
    values: Tensor
    granule: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self.indices, self.values


@dataclass(frozen=True, eq=False)
class RowDelta(Delta):
    """The same for an embedding, whose rows are looked up.

    The granules of row r are ``starts[r]`` to ``starts[r + 1]``, at most ``most`` of them.
    """

    starts: Tensor
    most: int

    @classmethod
    def of(cls, delta: Delta, rows: int, columns: int) -> RowDelta:
        """A granule of ``delta`` lies in one row."""
        bounds = torch.arange(rows + 1, device=delta.indices.device) * (columns // delta.granule)
        starts = torch.searchsorted(delta.indices.to(torch.int64), bounds)
        most = int((starts[1:] - starts[:-1]).max()) if rows else 0
        return cls(delta.indices, delta.values, delta.granule, starts, most)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.indices, self.values, self.starts


class Group(Shared):
    """The adapters of one weight that have the same granule, in the order in which they were added."""

    def __init__(self, deltas: Mapping[str, Delta], transposed: bool, compute: torch.dtype) -> None:
        self.names = tuple(deltas)
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.deltas = list(deltas.values())
        self.indices = [delta.indices for delta in self.deltas]
        self.values = [delta.values for delta in self.deltas]
        self.granule = self.deltas[0].granule
        self.transposed, self.compute, self.device = transposed, compute, self.values[0].device
        # A string, since a compiler follows a dictionary by it.
        self.key = f"{self.names!r} {self.device} {compute}"

    def only(self, names: Iterable[str]) -> Group | None:
        """The group of those among ``names``, or None: the op looks at every adapter that it is given."""
        kept = sorted(self.numbers[name] for name in names if name in self.numbers)
        if not kept:
            return None
        if len(kept) == len(self.names):
            return self
        return type(self)({self.names[k]: self.deltas[k] for k in kept}, self.transposed, self.compute)

    def lay(self, result: Tensor, input: Tensor, adapters: Tensor, alphas: Tensor, differentiable: bool) -> Tensor:
        """Add to each token's result what its adapter gives; in place, where it need not be differentiable.

        Args:
            result: ``[..., out]``.
            input: ``[..., in]`` of the same dtype, or an embedding's ids, ``[...]``.
            adapters: for each token the number of an adapter among ``names``, or -1.
            alphas: the strength of each.
        """
        transposed, granule = self.transposed, self.granule
        if differentiable:
            return _lay(result, input, adapters, alphas, transposed, granule, *self.indices, *self.values)
        shira_ops.sparse_linear_add_(
            result, input, self.indices, self.values, adapters, alphas, transposed=transposed, granule=granule
        )
        return result


class Rows(Group):
    """The same for an embedding, which looks rows up."""

    def lay(self, result: Tensor, input: Tensor, adapters: Tensor, alphas: Tensor, differentiable: bool) -> Tensor:
        rows, ids = result.view(-1, result.shape[-1]), input.reshape(-1)
        for number, delta in enumerate(self.deltas):
            assert isinstance(delta, RowDelta)
            if delta.most:
                rows = _lay_rows(rows, ids, delta, adapters, number, alphas)
        return rows.view(result.shape)


class Biases(Group):
    """The same for a bias: the values are what is added to all of it."""

    def __init__(self, deltas: Mapping[str, Delta], transposed: bool, compute: torch.dtype) -> None:
        super().__init__(deltas, transposed, compute)
        self.table = torch.stack(self.values)

    def lay(self, result: Tensor, input: Tensor, adapters: Tensor, alphas: Tensor, differentiable: bool) -> Tensor:
        rows = result.view(-1, result.shape[-1])
        chosen = adapters.clamp(min=0).to(torch.int64)
        shift = alphas[chosen][:, None] * self.table[chosen]
        mine = (adapters >= 0) & (alphas[chosen] != 0)
        return torch.where(mine[:, None], (rows.to(shift.dtype) + shift).to(rows.dtype), rows).view(result.shape)


# ---- which adapters for which sample -------------------------------------------------------------------------


@dataclass(eq=False)
class Rounds:
    """A selection as the op takes it. One call gives a sample one adapter; several adapters take several rounds."""

    # For each round: an adapter's number for each sample, or -1; and the strength of each adapter.
    pairs: list[tuple[Tensor, Tensor]]
    _spread: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def spread(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """The same for each token: those of a sample lie next to each other."""
        found = self._spread.get(tokens)
        if found is None:
            with quiet():
                found = [(spread(rows, tokens), alphas) for rows, alphas in self.pairs]
            if len(self._spread) >= _MOST_SPREAD:
                self._spread = {}
            self._spread[tokens] = found
        return found


def spread(rows: Tensor, tokens: int) -> Tensor:
    """One number a sample, as one a token."""
    samples = rows.shape[0]
    return rows[:, None].expand(samples, tokens // samples).contiguous().view(-1)


class Selection:
    """The adapters of each sample of a batch; of every sample alike, if it is only one."""

    def __init__(self, samples: Sequence[Strengths], *, listed: bool = False) -> None:
        self.given, self.listed = samples, listed
        self.samples = [{name: alpha for name, alpha in one.items() if alpha} for one in samples]
        self.count = len(samples)
        self.mentioned = frozenset(name for one in samples for name in one)
        self.names = frozenset(name for one in self.samples for name in one)
        # Whether a sample has several adapters, which are then summed before anything is rounded.
        self.mixed = any(len(one) > 1 for one in self.samples)
        # By the keys of groups; for all groups of a model, where it says so.
        self.rounds: dict[str, Rounds] = {}
        self.ready = False
        self._calls: dict[Hook, list[tuple[Group, Rounds]]] = {}

    def forget(self) -> None:
        """Groups have changed."""
        self.rounds, self.ready, self._calls = {}, False, {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Selection:
        """The same for a copy of the model: nothing but `_calls` knows its layers."""
        new = memo[id(self)] = Selection(self.given, listed=self.listed)
        new.rounds, new.ready = dict(self.rounds), self.ready
        return new

    def prepare(self, group: Group) -> Rounds:
        """The rounds for a group's adapters; made once."""
        found = self.rounds.get(group.key)
        if found is None:
            with quiet():
                found = self.rounds[group.key] = Rounds(list(self._rounds(group)))
        return found

    def calls(self, hook: Hook) -> list[tuple[Group, Rounds]]:
        """What to give the ops for a layer: of its groups those adapters that any sample has."""
        found = self._calls.get(hook)
        if found is None:
            groups = (group.only(self.names) for group in hook.groups)
            found = self._calls[hook] = [(group, self.prepare(group)) for group in groups if group is not None]
        return found

    def _rounds(self, group: Group) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = group.numbers
        rounds: list[tuple[list[int], dict[int, float]]] = [([-1] * self.count, {})]
        for sample, strengths in enumerate(self.samples):
            at = 0
            for name, alpha in strengths.items():
                if name not in numbers:
                    continue
                number = numbers[name]
                # An adapter has one strength in a round.
                while at < len(rounds) and rounds[at][1].get(number, alpha) != alpha:
                    at += 1
                if at == len(rounds):
                    rounds.append(([-1] * self.count, {}))
                rounds[at][0][sample] = number
                rounds[at][1][number] = alpha
                at += 1
        for rows, alphas in rounds:
            listed = [alphas.get(number, 0.0) for number in range(len(numbers))]
            yield (
                torch.tensor(rows, dtype=torch.int32, device=group.device),
                torch.tensor(listed, dtype=group.compute, device=group.device),
            )


# ---- whose tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What a forward pass was called with: ``samples``, of ``tokens`` each, the module that was called, the tensors."""

    samples: int
    tokens: int
    caller: nn.Module
    tensors: tuple[Tensor, ...] = ()


class _Local(threading.local):
    def __init__(self) -> None:
        self.batches: dict[int, Batch] = {}


_LOCAL = _Local()


@dataclass(eq=False)
class Block:
    """A ``with`` block of `Overlay.using`."""

    current: Current
    selection: Selection
    # The generator that opened it, if one did: it is for the code that runs in that generator.
    generator: int | None = None
    open: bool = True

    def waits(self) -> bool:
        """Whether it was opened by a generator that the caller doesn't run in."""
        return self.generator is not None and not _generators.is_running(self.generator)


# The blocks around the code that runs now; every thread and task has its own.
_INSIDE: ContextVar[tuple[Block, ...]] = ContextVar("shira.overlay.using", default=())


class Current:
    """What is selected now, and the batch that is computed: what the hooks of an `Overlay` ask.

    A copy of the model has hooks of its own, and a copy of this, with what was active where no block was open.
    """

    def __init__(self) -> None:
        self.hooks: dict[nn.Module, Hook] = {}
        # What is selected where no block is open.
        self.active: Selection | None = None
        # The open blocks of all threads and tasks.
        self.blocks: list[Block] = []
        # What CUDA graphs read that were captured here: they must find it as it was.
        self.captured: list[object] = []
        # What compiled models see, and whether there are any.
        self._shared: Selection | None = None
        self._shared_batch: Batch | None = None
        self.compiled = False
        # Whether a layer got tokens in two dimensions, of which the samples come first.
        self.samples_first = False
        # Layers that did not run, as far as it was said; and what was said about blocks.
        self._missed: set[nn.Module] = set()
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Current:
        new = memo[id(self)] = Current()
        new.hooks = copy.deepcopy(self.hooks, memo)
        new.active = new._shared = copy.deepcopy(self.active, memo)
        new.samples_first = self.samples_first
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "Overlay: a model with an Overlay cannot be pickled; detach() it first, or save the model's state_dict()"
        )

    # For hooks.

    def selection(self) -> Selection | None:
        """What is selected where this is called."""
        if torch.compiler.is_compiling():
            # A compiler would take what a context variable holds now for a constant.
            self.compiled = True
            return self._shared
        return self.now()

    def batch(self) -> Batch | None:
        """The batch of the forward pass around the caller."""
        return self._shared_batch if torch.compiler.is_compiling() else _LOCAL.batches.get(id(self))

    def note(self, batch: Batch | None) -> None:
        """A forward pass begins or ends."""
        self._shared_batch = batch
        if not torch.compiler.is_compiling():
            if batch is None:
                _LOCAL.batches.pop(id(self), None)
            else:
                _LOCAL.batches[id(self)] = batch

    def returned(self) -> None:
        """A forward pass of the model has ended: warn of layers on which adapters had no effect, once for each."""
        selection = self.now()
        if selection is None or self.compiled:
            return
        missed = {
            module: hook.name
            for module, hook in self.hooks.items()
            if not hook.ran and module not in self._missed and selection.calls(hook) and not EXPERTS.search(hook.name)
        }
        if missed:
            self._missed |= missed.keys()
            warnings.warn(
                f"Overlay: {_model.some(missed.values())} did not run in this forward pass, so adapters had no effect "
                f"there; nor will they, if the model uses these weights without running their layers",
                stacklevel=2,
            )

    def called(self) -> None:
        """A forward pass of the model begins: warn where it may have to have the adapters of another block, once."""
        self.keep_first()
        inside = _INSIDE.get()
        if not self.blocks and not inside:
            return
        block = self.block()
        if block is not None:
            what = (
                "this forward pass has the adapters of a using() block that was opened by a generator, which now waits "
                "at a yield: open a block here, too (using(None) for the base)"
            )
            wrong = block.waits()
        elif any(other.current is self for other in inside):
            what = (
                "this forward pass runs in a thread or task that was started inside a using() block, and that block "
                "has ended, so its adapters have no effect here: open a block in the thread or task itself"
            )
            wrong = True
        else:
            what = (
                "this forward pass runs in a thread or task where no using() block is open, while one is open in "
                "another. Its adapters have no effect here: open a block where the model is called (using(None) for "
                "the base), or use activate(), which is for all threads and tasks"
            )
            wrong = bool(self.blocks)
        if wrong:
            self.say(what, what)

    def keep_first(self) -> None:
        """Hooks that others put on the layers go after the Overlay's."""
        for module in self.hooks:
            _model.keep_first(module)

    def say(self, kind: str, what: str) -> None:
        """Warn, once for each kind."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"Overlay: {what}", stacklevel=3)

    # For the Overlay.

    def block(self) -> Block | None:
        """The innermost block of the caller. Those of generators that wait come last."""
        waiting = None
        for block in reversed(_INSIDE.get()):
            if block.current is self and block.open:
                if block.generator is None or not block.waits():
                    return block
                waiting = waiting or block
        return waiting

    def now(self) -> Selection | None:
        """What is selected for the calling thread or task."""
        block = self.block() if _INSIDE.get() else None
        return self.active if block is None else block.selection

    def select(self, selection: Selection | None) -> None:
        """Select this from now on, until the end of the caller's block if it is in one."""
        block = self.block()
        if block is None:
            self.active = selection
        else:
            block.selection = selection or Selection([{}])
        self.share()

    def enter(self, selection: Selection) -> Block:
        """Open a block."""
        generator = _generators.innermost()
        if self.compiled and self.blocks:
            last = self.blocks[-1]
            if last not in _INSIDE.get() or (generator is not None and last.waits()):
                raise SwitchError(
                    "Overlay: a using() block of another thread, task or generator is open, and the model is compiled: "
                    "a compiled model has one selection for the whole process"
                )
        block = Block(self, selection, generator)
        self.blocks.append(block)
        _INSIDE.set((*_INSIDE.get(), block))
        self.share()
        return block

    def leave(self, block: Block) -> None:
        """Close a block."""
        block.open = False
        _INSIDE.set(tuple(other for other in _INSIDE.get() if other is not block))
        self.blocks = [other for other in self.blocks if other is not block]
        # An interrupt may have stopped a forward pass before it could say so.
        _LOCAL.batches.pop(id(self), None)
        if not self.blocks:
            self._shared_batch = None
        self.share()

    def selections(self) -> list[Selection]:
        """All that is selected anywhere."""
        return [one for one in (self.active, *(block.selection for block in self.blocks)) if one is not None]

    def share(self) -> None:
        """Compiled models see the block that was opened last."""
        self._shared = self.blocks[-1].selection if self.blocks else self.active
        if self._shared is not None:
            self.ready(self._shared)

    def ready(self, selection: Selection) -> Selection:
        """The selection, prepared for every layer: a compiler must not follow that."""
        if not selection.ready:
            self.keep_first()
            for hook in self.hooks.values():
                for group in hook.groups:
                    selection.prepare(group)
            selection.ready = True
        return selection

    def regrouped(self) -> None:
        """The groups of layers have changed."""
        for selection in self.selections():
            selection.forget()
            self.ready(selection)


# The arguments that tell the batch where a model is called with names, as transformers and diffusers call them.
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "hidden_states", "sample")


def _shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Size | None:
    """The shape of the tensor that tells the batch."""
    for value in (*args, *[kwargs.get(name) for name in _INPUTS]):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape
    for value in kwargs.values():
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape
    return None


class Entrance:
    """Hooks on a module that is called from outside: notes what batch it was called with, until it returns.

    The modules inside it, which it calls itself, see that a batch is known already.
    """

    def __init__(self, current: Current, *, whole: bool) -> None:
        self.current = current
        # Whether it is the model itself.
        self.whole = whole

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.whole and not torch.compiler.is_compiling():
            self.current.called()
        selection = self.current.selection()
        if selection is None or selection.count == 1 or (self.current.batch() is not None and not self.whole):
            return
        given: Sequence[Any] = args
        if args and isinstance(args[0], Mapping):
            given, kwargs = args[1:], {**args[0], **kwargs}  # it stands for arguments with names
        shape, count = _shape(given, kwargs), selection.count
        if shape is None:
            raise SwitchError(
                f"Overlay: using() names samples, and none of the arguments of {type(module).__name__} is a tensor "
                f"that tells the batch"
            )
        if shape[0] % count:
            # A compiler has symbols for sizes, which it cannot write.
            named, got = (
                ("samples", "another") if torch.compiler.is_compiling() else (f"{count} samples", f"{shape[0]}")
            )
            raise SwitchError(
                f"Overlay: using() names {named}, and {type(module).__name__} was called with a batch of {got}: name "
                f"an adapter (or None) for each sample; a batch that holds every sample the same number of times in a "
                f"row works too, as beams do"
            )
        tensors: tuple[Tensor, ...] = ()
        if not torch.compiler.is_compiling():
            tensors = tuple(value for value in (*given, *kwargs.values()) if isinstance(value, Tensor))
        self.current.note(Batch(shape[0], shape[1] if len(shape) > 1 else 1, module, tensors))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = self.current.batch()
        if batch is not None and batch.caller is module:
            self.current.note(None)
        if self.whole and output is not None and not torch.compiler.is_compiling():  # None after an error
            self.current.returned()


# ---- the sums ------------------------------------------------------------------------------------------------------


class _Lay(torch.autograd.Function):
    """`sparse_linear_add_` as a function: linear in ``output`` and in ``input``."""

    @staticmethod
    def forward(
        output: Tensor, input: Tensor, adapters: Tensor, alphas: Tensor, transposed: bool, granule: int, *deltas: Tensor
    ) -> Tensor:
        return _laid(output.clone(), input, adapters, alphas, transposed, granule, *deltas)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, input, adapters, alphas, ctx.transposed, ctx.granule, *deltas = inputs
        ctx.shape, ctx.out_shape = input.shape, output.shape
        ctx.save_for_backward(adapters, alphas, *deltas)
        ctx.save_for_forward(adapters, alphas, *deltas)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        adapters, alphas, *deltas = ctx.saved_tensors
        to_input = None
        if ctx.needs_input_grad[1]:
            # A second backward pass goes through the function; a compiler cannot follow it without one.
            lay = _lay if torch.is_grad_enabled() or _is_transformed() else _laid
            nothing = grad.new_zeros(ctx.shape)
            to_input = lay(nothing, grad.contiguous(), adapters, alphas, not ctx.transposed, ctx.granule, *deltas)
        return (grad, to_input, *[None] * (4 + len(deltas)))


class _LayTransformed(_Lay):
    """The same under torch.func and in forward mode. A compiler takes no function that has a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, output: Tensor | None, input: Tensor | None, *_: Any) -> Tensor:
        adapters, alphas, *deltas = ctx.saved_for_forward
        if input is None:
            assert output is not None
            return output.clone()
        if output is None:
            output = input.new_zeros(ctx.out_shape)
        return _lay(output, input.contiguous(), adapters, alphas, ctx.transposed, ctx.granule, *deltas)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], output: Tensor, input: Tensor, adapters: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        """One more dimension of tokens."""
        output, input = (
            one.movedim(at, 0).contiguous() if at is not None else one.expand(info.batch_size, *one.shape).contiguous()
            for one, at in ((output, in_dims[0]), (input, in_dims[1]))
        )
        return _lay(output, input, adapters.repeat(info.batch_size), *rest), 0


def _laid(
    output: Tensor, input: Tensor, adapters: Tensor, alphas: Tensor, transposed: bool, granule: int, *deltas: Tensor
) -> Tensor:
    """Add to ``output``, in place; ``deltas`` are the indices of all adapters, and then the values."""
    count = len(deltas) // 2
    shira_ops.sparse_linear_add_(
        output, input, deltas[:count], deltas[count:], adapters, alphas, transposed=transposed, granule=granule
    )
    return output


def _lay(*args: Any) -> Tensor:
    """The same as a function that can be differentiated."""
    kind = _LayTransformed if _is_transformed() else _Lay
    return kind.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


def _lay_rows(result: Tensor, ids: Tensor, delta: RowDelta, adapters: Tensor, number: int, alphas: Tensor) -> Tensor:
    """What `_Lay` does, for one adapter of an embedding: adds the delta's rows to those that were looked up."""
    columns, granule = result.shape[-1], delta.granule
    mine = (adapters == number) & (alphas[number] != 0)
    first = delta.starts[ids]
    count = torch.where(mine, delta.starts[ids + 1] - first, 0)
    steps = torch.arange(delta.most, device=ids.device)
    inside = steps < count[:, None]
    at = torch.where(inside, first[:, None] + steps, 0)
    begins = torch.where(inside, delta.indices[at].to(torch.int64) * granule % columns, columns)
    # What is not inside goes behind the last column.
    to = begins[:, :, None] + torch.arange(granule, device=ids.device)
    values = delta.values.view(-1, granule)[at]
    added = values.new_zeros(ids.shape[0], columns + granule)
    added = added.scatter(1, to.reshape(ids.shape[0], -1), values.reshape(ids.shape[0], -1))[:, :columns]
    total = result.to(added.dtype) + alphas[number] * added
    return torch.where(mine[:, None], total.to(result.dtype), result)


def _is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, may be at work."""
    if torch.compiler.is_compiling():
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0


def is_captured(tensor: Tensor) -> bool:
    """Whether what computes the tensor is being captured into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class Hook:
    """The forward hook on a layer: adds to its output what the selected adapters of its weight and bias give."""

    _shira_first = True  # `_model.FIRST`

    def __init__(self, current: Current, layer: Layer) -> None:
        self.current = current
        self.name = layer.name
        self.embedding = layer.kind == EMBEDDING
        # The dimension of the weight that the layer's outputs are of.
        self.rows = 1 if layer.kind == CONV1D else 0
        # Whether ranks compute with parts of the layer; and how the weight was divided when adapters for it were added.
        self.divided = False
        self.division: Division | None = None
        # Whether the layer ever ran; and whether it ever got a batch whose sizes tell that samples come first.
        self.ran = self.settled = False
        # Of the weight, one for each granule; and of the bias.
        self.groups: list[Group] = []
        self.biased = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.ran = True
        selection = self.current.selection()
        if selection is None:
            return None
        if compiling:
            # All adapters, whether or not they are selected: so the next selection needs no other program.
            calls = [(group, selection.rounds[group.key]) for group in self.groups]
        else:
            calls = selection.calls(self)
            if not calls:
                return None
            self._refuse_backward()
        _model.check_first("Overlay", self.name, module)
        input = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(output, Tensor) or not isinstance(input, Tensor):
            raise SwitchError(f"Overlay: {self.name} must take a tensor and return one, got {type(output).__name__}")
        if output.is_nested:
            raise SwitchError(
                f"Overlay: {self.name} got a nested tensor, in which it is not known which rows belong to which "
                f"sample: pad it (torch.nested.to_padded_tensor), or put the adapter into the weights with a Switcher"
            )
        if self.divided:
            return self._lay_part(module, output, input, selection, calls)
        return self._lay_all(output, input, selection, calls)

    def _lay_all(
        self, output: Tensor, input: Tensor, selection: Selection, calls: Sequence[tuple[Group, Rounds]]
    ) -> Tensor:
        """The output with what the adapters give, all in memory of this rank."""
        compiling = torch.compiler.is_compiling()
        lead = input.shape if self.embedding else input.shape[:-1]
        if selection.count > 1:
            self._refuse_unknown(lead, self.current.batch(), input)
        tokens = math.prod(lead)
        differentiable = torch.is_grad_enabled() and (output.requires_grad or input.requires_grad)
        differentiable = differentiable or _is_transformed()
        # What is summed from several calls is rounded once.
        wide = output.dtype in _NARROW and (selection.mixed or self.biased)
        result = (output.to(torch.float32) if wide else output).contiguous()
        if not self.embedding:
            # As the layer itself computes: under autocast its input has another dtype.
            input = input.to(output.dtype).to(result.dtype).contiguous()
        for group, rounds in calls:
            if (group.compute == torch.float64) != (output.dtype == torch.float64):
                raise SwitchError(
                    f"Overlay: {self.name} gives {dtype_name(output.dtype)} now, and adapters for it were added as "
                    f"{dtype_name(group.compute)}: the model was cast since; cast it back, or make a new Overlay"
                )
            pairs = rounds.pairs if compiling else rounds.spread(tokens)
            if not compiling and is_captured(output):
                self.current.captured.append((group, pairs))
            for adapters, alphas in pairs:
                if compiling:
                    adapters = spread(adapters, tokens)
                result = group.lay(result, input, adapters, alphas, differentiable)
        return result.to(output.dtype)

    def _lay_part(
        self, module: nn.Module, output: Tensor, input: Tensor, selection: Selection,
        calls: Sequence[tuple[Group, Rounds]],
    ) -> Any:  # fmt: skip
        """The same in a layer of tensor parallelism: this rank's part of the output, from its part of the input.

        Where an output is to be added up over ranks, each rank adds what its own columns give, before that; and one of
        them the bias.
        """
        from torch.distributed.tensor import DTensor

        weight: Any = module._parameters["weight"]
        if not isinstance(output, DTensor) or not isinstance(input, DTensor) or not isinstance(weight, DTensor):
            raise SwitchError(
                f"Overlay: {self.name} is divided between ranks by itself and not in what it computes with; give it a "
                f"style of torch.distributed.tensor.parallel, or use a Switcher"
            )
        if torch.compiler.is_compiling():
            raise SwitchError(
                f"Overlay: {self.name} is divided between ranks, where an Overlay does not work in a compiled model; "
                f"use a Switcher, which does"
            )
        if torch.is_grad_enabled() and (output.requires_grad or input.requires_grad):
            raise SwitchError(
                f"Overlay: {self.name} is divided between ranks, where an Overlay has no gradients; compute under "
                f"torch.no_grad(), or use a Switcher"
            )
        if self.division not in (None, (weight.device_mesh, tuple(weight.placements))):
            raise SwitchError(
                f"Overlay: {self.name} is divided between ranks in another way than when adapters for it were added: "
                f"now {tuple(weight.placements)}; make a new Overlay"
            )
        first = self._check_placements(weight, output, input)
        mine = [(group, rounds) for group, rounds in calls if first or not isinstance(group, Biases)]
        result = self._lay_all(_shards.local(output), _shards.local(input), selection, mine)
        return DTensor.from_local(
            result, output.device_mesh, output.placements, run_check=False, shape=output.shape, stride=output.stride()
        )

    def _check_placements(self, weight: DTensor, output: DTensor, input: DTensor) -> bool:
        """Refuse an input or output of which this rank's part is not what its part of the weight computes.

        Returns whether this rank is the one that adds a bias.
        """
        coordinate, first, last = weight.device_mesh.get_coordinate() or (), True, output.dim() - 1
        same = weight.device_mesh == output.device_mesh == input.device_mesh
        for at, (of_weight, out, into) in enumerate(
            zip(weight.placements, output.placements, input.placements, strict=False)
        ):
            if not of_weight.is_shard():
                right = out == into and not out.is_partial() and not (out.is_shard() and out.dim == last)  # type: ignore[attr-defined]
            elif of_weight.dim == self.rows:  # type: ignore[attr-defined]
                right = out.is_shard(last) and into.is_replicate()
            else:
                right = out.is_partial() and into.is_shard(last)
                first = first and coordinate[at] == 0
            same = same and right
        if not same:
            raise SwitchError(
                f"Overlay: {self.name} has a weight with placements {tuple(weight.placements)}, an input with "
                f"{tuple(input.placements)} and an output with {tuple(output.placements)}, and it is not known which "
                f"part of the sums each rank has; give the layer the style ColwiseParallel or RowwiseParallel"
            )
        return first

    def _tells(self, lead: torch.Size, batch: Batch) -> bool:
        """Whether the sizes of an input tell that its first dimension is the samples, and not the tokens."""
        if len(lead) == 1:
            # What is pooled has a row a sample; but ids may be positions, one a token.
            return not self.embedding or batch.tokens != batch.samples
        if lead[1] == batch.samples:
            return False
        self.current.samples_first = self.current.samples_first or not self.embedding
        return True

    def _may_be_samples(self, lead: torch.Size, input: Tensor, batch: Batch) -> bool:
        """Whether the first dimension of an input may be the samples, where the tokens are as many, and the layer was
        never seen with another number: nothing speaks against it. Warns where nothing speaks for it either."""
        if _is_transformed():
            return True
        if self.embedding:
            # Ids that the model was called with, or that are the same for all samples; others may be positions alone.
            given = any(input.data_ptr() == one.data_ptr() for one in batch.tensors)
            if len(lead) > 1 or not given:
                return given or not input.stride(0)
        elif 0 < input.stride(0) < input.stride(1):
            return False  # two dimensions were swapped
        self.current.say(
            "square",
            f"the first batch with a list of adapters that {self.name} gets has {batch.samples} samples and as many "
            f"tokens, so that their sizes do not tell which of its dimensions is which: the first is taken for the "
            f"samples. A batch with another number of tokens settles it",
        )
        return True

    def _refuse_backward(self) -> None:
        if torch._C._current_graph_task_id() != -1:
            raise SwitchError(
                f"Overlay: {self.name} runs again in the backward pass (gradient checkpointing), when other adapters "
                f"may be selected than in the forward pass; switch checkpointing off, as by "
                f"model.gradient_checkpointing_disable()"
            )

    def _refuse_unknown(self, lead: torch.Size, batch: Batch | None, input: Tensor) -> None:
        """Refuse rows of which it is not known to which sample they belong."""
        if batch is None:
            raise SwitchError(
                f"Overlay: {self.name} runs outside the model's own forward, so that the batch is not known: call the "
                f"model, or select the same adapters for every sample"
            )
        if len(lead) and lead[0] == batch.samples:
            if torch.compiler.is_compiling():
                return
            self.settled = self.settled or self._tells(lead, batch)
            if self.settled or self._may_be_samples(lead, input, batch):
                return
        elif len(lead) == 1 and lead[0] == batch.samples * batch.tokens:
            if not torch.compiler.is_compiling() and not self.current.samples_first:
                self.current.say(
                    "flat",
                    f"{self.name} gets the tokens of all samples in one dimension, and no other layer has told yet "
                    f"that samples come first in this model: they are taken sample by sample, as reshape(-1, features) "
                    f"lays them where samples come first",
                )
            return
        sizes = ""
        if not torch.compiler.is_compiling():
            sizes = (
                f" with leading dimensions {list(lead)} in a batch of {batch.samples} samples with {batch.tokens} "
                f"tokens each"
            )
        raise SwitchError(
            f"Overlay: {self.name} got an input{sizes}, and it is not known which of its rows belong to which sample; "
            f"select the same adapters for every sample, or leave the layer out of the adapters"
        )
