"""Proof that the items of a batch do not depend on one another, nor on their places or number.

Of a model with that property, a run on many items is runs on some of them. The proof follows the batch through the
loops of every operator, at two sizes. Cases, by number:
1. an input lies along the batch if its first dimension is the batch's size, else it is shared by all items;
2. a block of loops hands the batch on if every element it reads of such tensors has the block's own index there, its
   results have that index at one place, and it is used for nothing else;
3. a tensor that no item has made, but whose size is the batch's, must be the same for all of them (a start value that
   is spread over the batch);
4. a reshape hands it on if the batch stays the outermost part of one dimension;
5. constants must not depend on the batch's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, relax, s_tir, tirx
from tvm.ir import GenericConst

from ingot.errors import UnsupportedError
from ingot.frontend.interface import Imported
from ingot.passes.definitions import DEFINITIONS
from ingot.passes.rewriter import bindings_of, op_name, outputs_of

_VIEWS = ("relax.reshape", "relax.flatten")
_SPATIAL = 0


@dataclass(frozen=True)
class Along:
    """A tensor along the batch: along `axis`, each item has `size` entries, one item after the other."""

    axis: int
    size: int = 1


#: What is known of a tensor: how it lies along the batch, or None for one that all items share.
Place = Along | None


class _DependentError(Exception):
    """Why items are not independent."""


def check_items(models: Sequence[Imported], batches: Sequence[int]) -> tuple[bool, ...]:
    """Prove that a model's items are independent, on its imports for two different batches of at least 2.

    Returns which inputs have an entry for each item; all outputs have one. Raises UnsupportedError that names the first
    node that breaks it.
    """
    return _Proof(models, batches).run()


class _Proof:
    def __init__(self, models: Sequence[Imported], batches: Sequence[int]) -> None:
        legalize = relax.transform.LegalizeOps(DEFINITIONS, skip_ops=list(_VIEWS))
        self.models, self.batches = models, batches
        self.modules = [legalize(model.module) for model in models]
        #: By variable of the second model.
        self.places: dict[Any, Place | tuple[Place, ...]] = {}

    def run(self) -> tuple[bool, ...]:
        mains = [module["main"] for module in self.modules]
        first, second = self.models
        where = f"model {first.name}"
        if first.states or first.counts:
            what = "state" if first.states else "an output whose size depends on data"
            raise UnsupportedError("a range of batches does not go together with this", where=where, found=what)
        lists = [bindings_of(main) for main in mains]
        same = len(mains[0].params) == len(mains[1].params) and len(lists[0]) == len(lists[1])
        if not same or any(op_name(a.value) != op_name(b.value) for a, b in zip(*lists, strict=True)):
            raise UnsupportedError("the model computes something else for another batch", where=where)
        count = len(first.inputs)
        for spec, a, b in zip(second.inputs, mains[0].params, mains[1].params, strict=False):
            _step(f"input {spec.name!r}", lambda a=a, b=b: self._input(a, b))
        for a, b in zip(mains[0].params[count:], mains[1].params[count:], strict=True):
            arrays = first.weights[str(a.name)], second.weights[str(b.name)]
            self.places[b] = _step(f"weight {b.name!r}", lambda v=arrays: self._constant(*v))
        for a, b in zip(*lists, strict=True):
            label = f"the node that makes {str(b.var.name)!r}"
            self.places[b.var] = _step(label, lambda a=a, b=b: self._binding(a, b))
        for spec, out in zip(second.outputs, outputs_of(mains[1]), strict=True):
            place = self._of(out)
            if place is None or place.axis or place.size != 1:
                found = "it is the same for all items" if place is None else f"its items lie along axis {place.axis}"
                raise UnsupportedError(
                    "an output has no entry for each item of the batch", f"output {spec.name!r}", found, "along axis 0"
                )
        return tuple(self.places[param] is not None for param in mains[1].params[:count])

    def _input(self, a: Any, b: Any) -> None:  # noqa: ANN401
        """Case 1."""
        place = self._grown(_shape(a), _shape(b))
        if place is not None and place != Along(0):
            raise _DependentError(f"its batch lies along axis {place.axis}")
        self.places[b] = place

    def _grown(self, a: tuple[int, ...], b: tuple[int, ...]) -> Place:
        """Where two shapes differ as the batches do."""
        axes = [axis for axis, (x, y) in enumerate(zip(a, b, strict=True)) if x != y] if len(a) == len(b) else [0, 0]
        if not axes:
            return None
        (x, y), axis = (a[axes[0]], b[axes[0]]), axes[0]
        if len(axes) > 1 or x % self.batches[0] or x * self.batches[1] != y * self.batches[0]:
            first, second = self.batches
            raise _DependentError(f"its shape is {list(a)} for {first} items and {list(b)} for {second}")
        return Along(axis, x // self.batches[0])

    def _constant(self, a: np.ndarray, b: np.ndarray) -> Place:
        """Case 5, and 3 for one that is spread over the batch."""
        place = self._grown(a.shape, b.shape)
        if place is not None:
            heads = [np.take(array, [0], place.axis) for array in (a, b)]
            if any(not np.array_equal(np.broadcast_to(h, v.shape), v) for h, v in zip(heads, (a, b), strict=True)):
                raise _DependentError("a constant differs from item to item")
            a, b = heads
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            raise _DependentError("a constant depends on the batch's size")
        return place

    def _of(self, expr: Any) -> Place:  # noqa: ANN401
        place = self.places.get(expr)
        return place[0] if isinstance(place, tuple) else place

    def _binding(self, a: Any, b: Any) -> Place | tuple[Place, ...]:  # noqa: ANN401
        value = b.value
        if isinstance(value, relax.Var):
            return self.places[value]
        if isinstance(value, relax.TupleGetItem):
            places = self.places[value.tuple_value]
            return places[int(value.index)] if isinstance(places, tuple) else places
        if isinstance(value, relax.Tuple):
            return tuple(self._of(item) for item in value.fields)
        if op_name(value) in _VIEWS:
            return self._reshape(self._of(value.args[0]), _shape(value.args[0]), _shape(b.var))
        if op_name(value) != "relax.call_tir":
            raise _DependentError("its loops are not known")
        operands: list[Place] = []
        for x, y in zip(a.value.args[1].fields, value.args[1].fields, strict=True):
            constant = isinstance(y, GenericConst)
            operands.append(self._constant(x.value.numpy(), y.value.numpy()) if constant else self._of(y))
        function = self.modules[1][value.args[0]]
        found = _Loops(function, operands, self.batches[1]).run()
        types = [list(v.ty.fields) if isinstance(v.ty, relax.TupleType) else [v.ty] for v in (a.var, b.var)]
        results = tuple(
            self._result(place, free, self._grown(*(tuple(int(d) for d in ty.shape) for ty in pair)))
            for (place, free), pair in zip(found, zip(*types, strict=True), strict=True)
        )
        return results if isinstance(b.var.ty, relax.TupleType) else results[0]

    @staticmethod
    def _result(place: Place, free: frozenset[int], grown: Place) -> Place:
        """What is known of a function's result: what its loops say must be what its shape says."""
        if place is None and grown is not None and grown.axis in free:
            return grown  # case 3
        if place != grown:
            raise _DependentError("its result mixes the items, or depends on their places")
        return place

    def _reshape(self, place: Place, before: tuple[int, ...], after: tuple[int, ...]) -> Place:
        """Case 4."""
        if place is None:
            return None
        outer, stride = prod(before[: place.axis]), place.size * prod(before[place.axis + 1 :])
        for axis, size in enumerate(after):
            rest = prod(after[axis + 1 :])
            if prod(after[:axis]) == outer and stride % rest == 0 and size == self.batches[1] * (stride // rest):
                return Along(axis, stride // rest)
        raise _DependentError(f"it takes the batch of {list(before)} apart to {list(after)}")


def _step(label: str, step: Any) -> Any:  # noqa: ANN401
    """The result of a step of the proof; UnsupportedError with the label where it fails."""
    try:
        return step()
    except _DependentError as error:
        raise UnsupportedError(
            "the items of a batch are not independent",
            where=label,
            found=str(error),
            allowed="operators that compute each item from that item alone",
            hint="give one size of the batch, or several in braces: --shape 'x={1,8},...'",
        ) from None


def _shape(expr: Any) -> tuple[int, ...]:  # noqa: ANN401
    return tuple(int(dim) for dim in expr.ty.shape)


class _Loops:
    """The batch in one PrimFunc: buffers along it, and axes along which buffers without items are all the same."""

    def __init__(self, function: Any, places: Sequence[Place], batch: int) -> None:  # noqa: ANN401
        self.params = list(function.params)
        self.batch = batch
        self.places: dict[Any, Along] = {
            buffer: place for buffer, place in zip(self.params, places, strict=False) if place is not None
        }
        self.free: dict[Any, frozenset[int]] = {}
        self.inputs = len(places)
        self.blocks: list[Any] = []
        tvm_ffi.structural_walk(function.body, [(s_tir.SBlockRealize, self.blocks.append)])
        self.blocks = [realize for realize in self.blocks if not _holds_blocks(realize.block)]

    def run(self) -> list[tuple[Place, frozenset[int]]]:
        """For each result: how it lies along the batch, and along which axes it is all the same."""
        for _ in range(2):  # the second time, what is written before any item is known to be along the batch too
            for realize in self.blocks:
                self._block(realize)
        everywhere = [frozenset(range(len(buffer.shape))) for buffer in self.params]
        outputs = list(zip(self.params, everywhere, strict=True))[self.inputs :]
        return [(self.places.get(buffer), self.free.get(buffer, every)) for buffer, every in outputs]

    def _block(self, realize: Any) -> None:  # noqa: ANN401
        block = realize.block
        parts = [block.body, *([block.init] if block.init is not None else [])]
        loads, stores, names = list[Any](), list[Any](), list[Any]()
        for part in parts:
            tvm_ffi.structural_walk(part, [(ir.TensorLoad, loads.append)])
            tvm_ffi.structural_walk(part, [(tirx.BufferStore, stores.append)])
            tvm_ffi.structural_walk(part, [(ir.Var, names.append)])
        index = self._index(loads, stores)
        if index is None:
            for store in stores:
                self._spread(store)
            return
        spatial = [v.var for v, bound in zip(block.iter_vars, realize.iter_values, strict=True)
                   if int(v.iter_type) == _SPATIAL and isinstance(bound, ir.Var)]  # fmt: skip
        if not any(index.same_as(var) for var in spatial):
            raise _DependentError("it combines different items")
        uses = 0
        sizes = {self.places[load.source].size for load in loads if load.source in self.places}
        for store in stores:
            axes = [axis for axis, at in enumerate(store.indices) if at.same_as(index)]
            if len(axes) != 1:
                raise _DependentError("it combines different items")
            place = self.places.get(store.buffer)
            size = int(store.buffer.shape[axes[0]]) // self.batch
            sizes.add(size)
            if place not in (None, Along(axes[0], size)):
                raise _DependentError("its results lie along the batch in two ways")
            self.places[store.buffer] = Along(axes[0], size)
            uses += 1
        for load in loads:
            if load.source in self.places:
                if not load.indices[self.places[load.source].axis].same_as(index):
                    raise _DependentError("it combines different items")
                uses += 1
        if len(sizes) != 1:
            raise _DependentError("it combines parts of items in different ways")
        if uses != sum(name.same_as(index) for name in names):
            raise _DependentError("what it computes depends on an item's place in the batch")

    def _index(self, loads: Sequence[Any], stores: Sequence[Any]) -> Any:  # noqa: ANN401
        """The index of the item in a block; None if it reads and writes nothing along the batch."""
        for load in loads:
            if load.source in self.places:
                return load.indices[self.places[load.source].axis]
        for store in stores:
            if store.buffer in self.places:
                return store.indices[self.places[store.buffer].axis]
        return None

    def _spread(self, store: Any) -> None:  # noqa: ANN401
        """Along which axes a store without items writes the same everywhere: where its value does not ask for it."""
        asked: list[Any] = []
        tvm_ffi.structural_walk(store.value, [(ir.Var, asked.append)])
        free = frozenset(
            axis
            for axis, at in enumerate(store.indices)
            if isinstance(at, ir.Var)
            and not any(name.same_as(at) for name in asked)
            and sum(other.same_as(at) for other in store.indices) == 1
        )
        self.free[store.buffer] = self.free.get(store.buffer, free) & free


def _holds_blocks(block: Any) -> bool:  # noqa: ANN401
    found: list[Any] = []
    tvm_ffi.structural_walk(block.body, [(s_tir.SBlockRealize, found.append)])
    return bool(found)
