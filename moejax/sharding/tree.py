"""Names, kinds and sizes of the arrays in a tree, whatever containers hold them."""

import math

import jax


def flatten(tree: object) -> dict[str, jax.Array]:
  """{'model/blocks/moe/gate': leaf} in the tree's order, whatever containers hold the leaves."""
  leaves: dict[str, jax.Array] = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    is_param = keys and keys[-1] == jax.tree_util.GetAttrKey(
      'value'
    )  # how nnx.Param holds its array
    path = jax.tree_util.keystr(keys[:-1] if is_param else keys, simple=True, separator='/')
    if path in leaves:
      raise TypeError(f'{path}: two leaves have this name; rename one')
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
      raise TypeError(f'{path} is {type(leaf).__name__}; make it a jax.Array')
    leaves[path] = leaf
  return leaves


def kinds(tree: object) -> dict[str, str]:
  """path -> 'float32[4, 8]'."""
  return {path: f'{leaf.dtype.name}{list(leaf.shape)}' for path, leaf in flatten(tree).items()}


def size(tree: object) -> int:
  """Numbers in all the arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
