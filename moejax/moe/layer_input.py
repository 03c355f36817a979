"""What an MoE layer may be called with, and on which mesh.

Letters: B batch, S sequence, D model.
"""

import jax
import jax.numpy as jnp
from jax import Array

from moejax.sharding.mesh import MESH_AXES


def expect_input(x: Array, d_model: int) -> None:
  """ValueError where x is not [B, S, D] of a floating dtype."""
  if x.ndim != 3 or x.shape[-1] != d_model or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'x is {x.dtype}{list(x.shape)}: use [B, S, {d_model}] of a floating dtype, the output of '
      'the norm before the layer'
    )


def expect_mesh_axes() -> None:
  """ValueError where a mesh is set that lacks an axis which experts and tokens are laid out by."""
  mesh = jax.sharding.get_abstract_mesh()
  missing = [axis for axis in MESH_AXES if axis not in mesh.shape]
  if not mesh.empty and missing:
    raise ValueError(
      f'the mesh has axes {mesh.axis_names} and lacks {missing}: make it with '
      'moejax.sharding.make_mesh, sizes of 1 for axes that are not used'
    )
