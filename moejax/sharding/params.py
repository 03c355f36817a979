"""Parameters that know their logical axes: how they are made and where they lie on a mesh."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.sharding.logical_axes import param_spec

Tree = TypeVar('Tree')

Init = Callable[[Array, tuple[int, ...]], Array]  # (key, shape) -> f32 of the shape


def normal_init(std: float) -> Init:
  """Returns an initialiser that draws from a normal of mean 0 and the given standard deviation."""
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant_init(value: float) -> Init:
  """Returns an initialiser with one number everywhere: 1 for the scale of a norm, 0 for a bias."""
  return lambda key, shape: jnp.full(shape, value, jnp.float32)


def param(key: Array, shape: tuple[int, ...], axes: tuple[str, ...], init: Init) -> nnx.Param:
  """Returns a float32 parameter that knows its logical axes.

  Args:
    key: for `init`.
    shape: of the parameter.
    axes: the logical axis of each dimension; `moejax.sharding.RULES` says where they lie.
    init: makes the array.
  """
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(key, shape), axes=axes)


def is_param(node: object) -> bool:
  """Tells whether a node of a tree is a parameter, which has its logical axes in its metadata.

  For `jax.tree.map(..., is_leaf=is_param)`: to stop there, and not at the array within.
  """
  return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
  """Returns the logical axis of each dimension of a parameter."""
  axes = param.get_metadata('axes')
  # jax.vmap over layers puts dimensions in front that the metadata does not know of.
  stacked = len(param.shape) - len(axes)
  return ('layer',) * stacked + tuple(axes)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
  """Returns the sharding of every leaf of a tree, in the tree's structure.

  Parameters lie by their logical axes, anything else is replicated.
  """

  def node_shardings(node: object) -> object:
    sharding = _sharding(node, mesh)
    return jax.tree.map(lambda _: sharding, node)

  return jax.tree.map(node_shardings, tree, is_leaf=is_param)


def constrain_params(tree: Tree) -> Tree:
  """Returns a tree whose parameters are laid out as `shardings` says; without a mesh, the tree.

  In a compiled program, where the compiler would lay them out in another way.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return tree

  def constrain_node(node: object) -> object:
    if not is_param(node):
      return node
    where = _spec(node, mesh.shape)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), node)

  return jax.tree.map(constrain_node, tree, is_leaf=is_param)


def bytes_on_device(tree: object, mesh: Mesh) -> int:
  """Returns the bytes of a tree's arrays on one device of a mesh, laid out as by `shardings`."""
  total = 0
  for node in jax.tree.leaves(tree, is_leaf=is_param):
    sharding = _sharding(node, mesh)
    for leaf in jax.tree.leaves(node):
      total += math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return total


def _sharding(node: object, mesh: Mesh) -> NamedSharding:
  """Returns where a parameter, or any other node of a tree, lies."""
  return NamedSharding(mesh, _spec(node, mesh.shape) if is_param(node) else PartitionSpec())


def _spec(param: nnx.Variable, sizes: Mapping[str, int]) -> PartitionSpec:
  """Returns how a parameter lies on a mesh whose axes have these sizes."""
  return param_spec(param_axes(param), param.shape, sizes)
