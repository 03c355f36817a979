"""How a token is drawn from logits: by temperature, top-k and top-p.

An array is named with the letters of its shape: logits_BCV is [B, C, V].

Letters: B batch, C places of a row, V vocab, N places of all rows, B C.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

NOT_FINITE = -1  # in place of a token where logits are NaN or infinite: any token would be made up


class SamplingParams(NamedTuple):
  """How a token is drawn from logits; arrays, so that other values are no other program."""

  key: Array
  temperature: Array  # 0: the likeliest
  top_k: Array  # i32; 0: all
  top_p: Array


def draw(logits_BCV: Array, places_BC: Array, params: SamplingParams) -> Array:
  """Draws a token from each place's logits, [B, C] i32: the same for the same row and place.

  It is NOT_FINITE where one of them is.
  """
  rows_BC = jnp.broadcast_to(jnp.arange(places_BC.shape[0])[:, None], places_BC.shape)

  def key_of(row: Array, place: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(params.key, row), place)

  keys_N = jax.vmap(key_of)(rows_BC.reshape(-1), places_BC.reshape(-1))
  logits_NV = logits_BCV.reshape(-1, logits_BCV.shape[-1])
  # A `cond` and not a `where`: at temperature 0 nothing is divided by it, and no time is spent.
  drawn_N = jax.lax.cond(
    params.temperature > 0,
    functools.partial(draw_at_random, keys_N=keys_N, params=params),
    lambda logits_NV: logits_NV.argmax(-1),
    logits_NV,
  )
  drawn_N = jnp.where(jnp.isfinite(logits_NV).all(-1), drawn_N, NOT_FINITE)
  return drawn_N.reshape(places_BC.shape).astype(jnp.int32)


def draw_at_random(logits_NV: Array, keys_N: Array, params: SamplingParams) -> Array:
  """Draws from the top_k likeliest the fewest that have probability top_p, [N].

  The latter is nucleus sampling (Holtzman et al. 2020).
  """
  logits_NV = logits_NV / params.temperature
  ones_NV = jnp.ones_like(logits_NV)
  among_top_k = largest_mask(logits_NV, ones_NV, params.top_k, params.top_k > 0)
  logits_NV = jnp.where(among_top_k, logits_NV, -jnp.inf)
  probs_NV = jax.nn.softmax(logits_NV)  # of what top_k leaves
  among_top_p = largest_mask(logits_NV, probs_NV, params.top_p, params.top_p < 1)
  logits_NV = jnp.where(among_top_p, logits_NV, -jnp.inf)
  return jax.vmap(jax.random.categorical)(keys_N, logits_NV)


def largest_mask(x_NV: Array, weights_NV: Array, amount: Array, on: Array) -> Array:
  """Marks the largest entries of each row whose weights reach `amount`, and their ties.

  The least of them is found bit by bit, in 32 passes: a sort of a large vocabulary takes ten times
  as long.

  Args:
    x_NV: f32, compared.
    weights_NV: what each entry adds to the amount.
    on: bool; all entries are marked if not.

  Returns:
    [N, V] bool.
  """
  bits_NV = jax.lax.bitcast_convert_type(x_NV, jnp.uint32)
  # Unsigned numbers in the order of x: the bits of negative floats run backwards.
  negative_NV = bits_NV >> 31 == 1
  rank_NV = jnp.where(negative_NV, ~bits_NV, bits_NV | jnp.uint32(1 << 31))

  def try_bit(i: Array, least_N1: Array) -> Array:
    higher_N1 = least_N1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
    total_N1 = jnp.where(rank_NV >= higher_N1, weights_NV, 0).sum(-1, keepdims=True)
    return jnp.where(total_N1 >= amount, higher_N1, least_N1)

  # No pass leaves the least at 0, which every entry reaches.
  passes = jnp.where(on, 32, 0)
  return rank_NV >= jax.lax.fori_loop(0, passes, try_bit, jnp.zeros_like(rank_NV[:, :1]))
