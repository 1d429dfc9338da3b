"""One table per parameter tree: everything about a parameter stands in one place, once.

A table is a nested dict (or tuple) whose leaves are `Param`. Initial values, abstract shapes,
shardings, loading, exporting and the parameter count are all derived from it.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from MaxDraft import sharding

Tree = Any


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the output dimension of a tensor that holds several parameters fused.

    The parameter is [start : start + size * step : step] of `total` outputs; size: the parameter's
    output dimension.
    """

    start: int
    total: int
    step: int = 1


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """Where and how the tensors of a checkpoint hold a parameter.

    name: "{layer}" stands for the 0-based layer; "{expert}" for the expert, where every expert has
        a tensor of its own instead of one [experts, ...].
    transposed: the last two dimensions are [out, in].
    part: of a fused tensor; None: the whole.
    """

    name: str
    transposed: bool = False
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter.

    shape: of one layer, as the code uses it: matrices are [in, out], experts' [experts, in, out].
    axes: logical axis of every dimension.
    tensor, transposed, part: the default TensorLayout, the first that is looked for.
    dtype: in memory.
    init: "matrix" draws from normal(0, 1/sqrt(fan_in)); "ones"; "zeros".
    layers: the layers stacked along a leading dimension; None: no such dimension.
    other_layouts: tried in order where the tensors of the default layout are absent.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    tensor: str
    dtype: Any = jnp.float32
    init: str = "matrix"
    transposed: bool = False
    layers: Sequence[int] | None = None
    part: Part | None = None
    other_layouts: tuple[TensorLayout, ...] = ()

    @property
    def layouts(self) -> tuple[TensorLayout, ...]:
        """All layouts in which a checkpoint may hold it, the default first."""
        return (TensorLayout(self.tensor, self.transposed, self.part), *self.other_layouts)

    @property
    def full_shape(self) -> tuple[int, ...]:
        return self.shape if self.layers is None else (len(self.layers), *self.shape)

    @property
    def full_axes(self) -> tuple[str | None, ...]:
        return self.axes if self.layers is None else (None, *self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix kept in memory as its checkpoint holds it, dequantized in the product (linear).

    In a table its leaves are Params, in a tree of parameters arrays.
    FP8     values uint8 [..., in, out], the bits of float8_e4m3fn, stored as uint8: XLA:CPU would
            convert a float8 array to float16 before each scan; scale float32 [..., in / a, out / b]
            with any block a x b: 128 x 128, or a whole column, or everything
    MXFP4   values uint8 [..., in / 2, out], two e2m1 numbers a byte, the even input in the low
            half; scale uint8 [..., in / 32, out], or finer: exponents of two, bias 127
    """

    values: Any
    scale: Any
    in_size: int = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})  # "fp8" or "mxfp4"
    tiled: str = dataclasses.field(metadata={"static": True})  # tiles are cut along "in" or "out"


def flatten(table: Tree) -> list[tuple[str, Param]]:
    """[(path, Param)] in the tree's order, e.g. ("layers/0/q", Param(...))."""
    leaves = jax.tree_util.tree_flatten_with_path(table)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), p) for path, p in leaves]


def count(table: Tree) -> int:
    """Number of parameters."""
    return sum(math.prod(param.full_shape) for _, param in flatten(table))


def shardings(table: Tree, mesh: Mesh, rules: sharding.Rules) -> Tree:
    """Tree of NamedSharding; raises ShardingError naming a parameter that cannot be split so."""
    for name, param in flatten(table):
        spec = sharding.named_sharding(mesh, rules, param.full_axes)
        sharding.check_divisible(name, param.full_shape, spec)
    return jax.tree.map(lambda p: sharding.named_sharding(mesh, rules, p.full_axes), table)


def abstract(table: Tree, placement: Tree | None = None) -> Tree:
    """Tree of ShapeDtypeStruct, with shardings where `placement` gives them."""
    if placement is None:
        return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.full_shape, p.dtype), table)
    return jax.tree.map(
        lambda p, place: jax.ShapeDtypeStruct(p.full_shape, p.dtype, sharding=place),
        table,
        placement,
    )


def initialize(table: Tree, seed: int) -> Tree:
    """Initial parameters; a parameter's draw depends on the seed and its own path only."""
    root = jax.random.key(seed)

    def draw(path, param: Param) -> jax.Array:
        if param.init == "ones":
            return jnp.ones(param.full_shape, param.dtype)
        if param.init == "zeros":
            return jnp.zeros(param.full_shape, param.dtype)
        key = jax.random.fold_in(root, zlib.crc32(jax.tree_util.keystr(path).encode()))
        scale = param.shape[-2] ** -0.5
        return scale * jax.random.normal(key, param.full_shape, param.dtype)

    return jax.tree_util.tree_map_with_path(draw, table)
