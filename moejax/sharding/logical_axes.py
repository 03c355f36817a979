"""The device mesh, and the one table that says which mesh axis each logical axis is split over.

Mathematics elsewhere names logical axes only: `constrain(x, 'batch', 'sequence', 'embed')`. Outside
a mesh (a unit test, a notebook cell) constraints do nothing, so every function also runs on plain
arrays.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

Tree = TypeVar('Tree')

# Tokens are split over `expert` too: expert parallelism divides the same tokens that data
# parallelism would, and exchanges them only inside a dispatcher.
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'sequence': (),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'expert': ('expert',),
  'vocab': ('tensor',),
  'layer': (),
  'norm': (),
}


def platform() -> str:
  """Returns 'cpu', 'gpu' or 'tpu': what the program that is being traced will run on.

  Also where it is compiled ahead of time, for chips that this machine does not have.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def row_shards() -> int:
  """Returns into how many pieces the current mesh cuts the rows of a batch; 1 without a mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[axis] for axis in RULES['batch'] if axis in sizes)


def spec(*axes: str) -> PartitionSpec:
  """Returns the mesh axes of these logical axes, one a dimension; '' leaves a dimension whole."""
  return PartitionSpec(*(_mesh_axes(axis) for axis in axes))


def param_spec(
  axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns the mesh axes of each dimension of a parameter, which depend on its shape.

  They are those of RULES but for a stack of experts whose number `expert` and `fsdp` together
  divide: there `fsdp` splits the experts, and not each of them along `embed`. Gathered over `fsdp`,
  a matrix then comes in one piece, as grouped kernels want it; pieces along `embed` would have to
  be copied together.

  Args:
    axes: the logical axis of each dimension, '' for none.
    shape: of the parameter.
    sizes: of the mesh axes.
  """
  named = dict(zip(axes, shape, strict=True))
  if 'expert' not in named or 'embed' not in named:
    return spec(*axes)
  if named['expert'] % (sizes['expert'] * sizes['fsdp']):
    return spec(*axes)
  whole = {'expert': (*RULES['expert'], *RULES['embed']), 'embed': None}
  return PartitionSpec(*(whole[axis] if axis in whole else _mesh_axes(axis) for axis in axes))


def _mesh_axes(axis: str) -> tuple[str, ...] | None:
  """Returns the mesh axes that a logical axis is split over, None for none of them."""
  return RULES[axis] or None if axis else None


def constrain(x: Array, *axes: str) -> Array:
  """Returns `x` with its dimensions laid out as RULES says.

  Without a mesh, or with only one device, that is `x` itself.

  A dimension that its mesh axes do not divide stays whole, as key-value heads do where there are
  fewer than devices: XLA would pad it, and then find no other way than to gather everything.

  Args:
    x: of any shape.
    *axes: the logical axis of each dimension, '' for none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  divided = []
  for axis, n in zip(axes, x.shape, strict=True):
    shards = math.prod(mesh.shape[name] for name in RULES[axis]) if axis else 1
    divided.append(axis if n % shards == 0 else '')
  return jax.lax.with_sharding_constraint(x, spec(*divided))


def sum_row_shards(parts: Array, *axes: str) -> Array:
  """Returns the sum of what each piece of the rows has, laid out as `constrain` would.

  In two sums: over `fsdp` first, which leaves each device its own piece of 'embed' (a
  reduce-scatter), and then that piece over the other axes of rows. Of one sum, XLA makes an
  all-reduce of whole arrays wherever those axes have more than one device.

  Args:
    parts: [n, ...], n = `row_shards()`, of which each device has its own.
    *axes: the logical axis of each dimension of the sum, '' for none.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  data, fsdp, expert = (sizes[axis] for axis in RULES['batch'])
  if 'embed' not in axes or parts.shape[1 + axes.index('embed')] % fsdp:
    return constrain(parts.sum(0), *axes)
  over_fsdp = parts.reshape(data, fsdp, expert, *parts.shape[1:]).sum(1)
  pieces = PartitionSpec('data', 'expert', *spec(*axes))
  return constrain(jax.lax.with_sharding_constraint(over_fsdp, pieces).sum((0, 1)), *axes)


def replicated(tree: Tree) -> Tree:
  """Returns a tree whose arrays are whole on every device, for every process to read.

  To be called in a compiled program; the leaves may also be Python numbers.
  """
  return jax.tree.map(lambda x: constrain(jnp.asarray(x), *('',) * jnp.ndim(x)), tree)
