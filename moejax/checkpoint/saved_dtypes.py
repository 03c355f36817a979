"""Leaves that were saved in another dtype than a program has now: which of them are still the same.

  as_saved(wanted, kinds) -> what to read -> as_wanted(leaf, dtype)

Counts were float32 before they were int32. Parameters may lie in bfloat16 where a model was
imported so: the same numbers in float32 are exact.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.config import check, problem_if
from moejax.sharding.tree import kinds

# dtype of a program -> another one in which its leaves may have been saved
ALSO_SAVED_AS = {jnp.dtype('int32'): jnp.float32, jnp.dtype('float32'): jnp.bfloat16}


def as_saved(
  wanted: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, str]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns what to read: the wanted leaves, those in another dtype that were saved in it.

  Args:
    wanted: path -> shape, dtype and sharding.
    saved: path -> dtype and shape, see `kinds`.
  """
  found = dict(wanted)
  for path, leaf in wanted.items():
    if leaf.dtype in ALSO_SAVED_AS:
      dtype = ALSO_SAVED_AS[leaf.dtype]
      other = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
      if path in saved and saved[path] == kinds({path: other})[path]:
        found[path] = other
  return found


def as_wanted(leaf: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns the leaf in the dtype of the program.

  Raises:
    ConfigError: its numbers are not the same in that dtype: it should be counts, and is not.
  """
  if leaf.dtype == dtype:
    return leaf
  converted = leaf.astype(dtype)
  is_same = dtype == jnp.float32 or bool((converted.astype(leaf.dtype) == leaf).all())
  check(problem_if(not is_same, f'a leaf of {leaf.dtype} is not one of {dtype}: use a new workdir'))
  return converted
