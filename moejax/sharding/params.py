"""Parameters that know their logical axes: how they are made, how they start, and where they lie on a mesh."""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.sharding.logical_axes import spec

Tree = TypeVar('Tree')

Init = Callable[[Array, tuple[int, ...]], Array]


def normal_init(std: float) -> Init:
  """Normal of mean 0 and the given standard deviation."""
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant_init(value: float) -> Init:
  """The same number everywhere: 1 for the scale of a norm, 0 for a bias."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def param(key: Array, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> nnx.Param:
  """A float32 parameter that knows its logical axes; `moejax.sharding.RULES` says where they lie."""
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(key, shape), axes=axes)


def is_param(node: object) -> bool:
  """For `jax.tree.map(..., is_leaf=is_param)`: stop at a parameter, where its logical axes are written."""
  return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
  """The logical axes of a parameter; a stack of layers made by `jax.vmap` has some that its metadata does not know."""
  axes = param.get_metadata('axes')
  return ('layer',) * (len(param.shape) - len(axes)) + tuple(axes)


def param_spec(param: nnx.Variable) -> PartitionSpec:
  """The mesh axes of a parameter's dimensions."""
  return spec(*param_axes(param))


def shardings(tree: Tree, mesh: Mesh) -> Tree:
  """The sharding of every leaf of `tree`, in its structure: parameters by their axes, anything else replicated."""

  def of(node: object) -> object:
    where = param_spec(node) if is_param(node) else PartitionSpec()
    return jax.tree.map(lambda _: NamedSharding(mesh, where), node)

  return jax.tree.map(of, tree, is_leaf=is_param)


def bytes_on_device(tree: object, mesh: Mesh) -> int:
  """Of a state's arrays on one device, under the table of shardings."""

  def of(node: object) -> int:
    sharding = NamedSharding(mesh, param_spec(node)) if is_param(node) else None
    return sum(
      math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize
      for leaf in jax.tree.leaves(node)
    )

  return sum(of(node) for node in jax.tree.leaves(tree, is_leaf=is_param))
