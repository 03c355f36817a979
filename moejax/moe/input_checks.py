"""What a router or an MoE layer refuses to be given: arrays of another shape, dtype or mesh.

XLA broadcasts, clips and promotes without a word, so that what does not fit would be computed with.

Letters: B batch, S sequence, D model, E experts.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from moejax.moe.selection import Tokens
from moejax.sharding.mesh import MESH_AXES


def expect_input(x: Array, d_model: int) -> None:
  """ValueError where x is not [B, S, D] of a floating dtype."""
  if x.ndim != 3 or x.shape[-1] != d_model or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'x is {x.dtype}{list(x.shape)}: use [B, S, {d_model}] of a floating dtype, the output of '
      'the norm before the layer'
    )


def expect_logits(logits: Array, num_experts: int) -> None:
  """ValueError where the logits are not float32 [B, S, E] of that E."""
  if logits.ndim != 3 or logits.shape[-1] != num_experts or logits.dtype != jnp.float32:
    raise ValueError(
      f'logits are {logits.dtype}{list(logits.shape)}: use float32 [B, S, {num_experts}], as '
      f'router_logits gives for num_experts={num_experts}'
    )


def expect_bias(bias: Array, num_experts: int) -> None:
  """ValueError where the router bias is not float32 [E]."""
  if bias.shape != (num_experts,) or bias.dtype != jnp.float32:
    raise ValueError(
      f'bias is {bias.dtype}{list(bias.shape)}: use float32 [{num_experts}], an entry for each '
      'expert, or None'
    )


def expect_tokens(tokens: Tokens, shape: tuple[int, int]) -> None:
  """ValueError where `tokens` are not those of B rows of S tokens."""
  fields = {'ids': tokens.ids, 'mask': tokens.mask, 'segments': tokens.segments}
  fields['places'] = tokens.places
  for name, value in fields.items():
    if value is not None and value.shape != shape:
      raise ValueError(
        f'tokens.{name} is {list(value.shape)}: use {list(shape)}, an entry for each token at hand'
      )
  if tokens.rows.shape != shape[:1]:
    raise ValueError(f'tokens.rows is {list(tokens.rows.shape)}: use {list(shape[:1])}')
  if tokens.replayed is not None and tokens.replayed.shape[:2] != shape:
    raise ValueError(
      f'tokens.replayed is {list(tokens.replayed.shape)}: use [{shape[0]}, {shape[1]}, K], the '
      'expert_ids of the same tokens'
    )


def expect_whole(whole: Mapping[str, Array], name: str, set_rows: int, rows: int) -> None:
  """ValueError where nothing is given of the sets of a balance loss, larger than the rows of x."""
  if name not in whole:
    raise ValueError(
      f'the balance loss {name!r} is of sets of {set_rows} rows, and x has {rows}: use '
      f'whole={{{name!r}: ...}}, what BALANCE_LOSSES[{name!r}].seen sums over the set, '
      f'or Scope(rows=0), all rows of x, or whole=None, no losses'
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
