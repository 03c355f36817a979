"""Names, kinds and sizes of the arrays in a tree, whatever containers hold them.

The names are those of checkpoints. They depend on the attributes of modules, and on no class of
Flax.
"""

import math

import jax


def flatten(tree: object) -> dict[str, jax.Array]:
  """Returns path -> leaf, as {'model/blocks/moe/gate': array}, in the tree's order.

  Raises:
    TypeError: two leaves have one path, or a leaf is no jax.Array.
  """
  leaves: dict[str, jax.Array] = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    # nnx.Param holds its array in an attribute `value`, which is no part of our names.
    is_param = keys and keys[-1] == jax.tree_util.GetAttrKey('value')
    path = jax.tree_util.keystr(keys[:-1] if is_param else keys, simple=True, separator='/')
    if path in leaves:
      raise TypeError(f'{path}: two leaves have this name; rename one')
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      raise TypeError(f'{path} is {type(leaf).__name__}; make it a jax.Array')
    leaves[path] = leaf
  return leaves


def kinds(tree: object) -> dict[str, str]:
  """Returns path -> dtype and shape of each leaf, as 'float32[4, 8]'."""
  return {path: f'{leaf.dtype.name}{list(leaf.shape)}' for path, leaf in flatten(tree).items()}


def size(tree: object) -> int:
  """Returns how many numbers there are in all the arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
