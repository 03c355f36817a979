"""The quantile rule's histogram: how far each expert's choices lie above the line to be chosen.

  choice = scores + bias, less the token's (K+1)-th largest
  -> counts [E, BINS] -> the quantile of each expert

Counts are whole numbers: they add up over micro-batches, shards and devices to the same bits in any
order, and the quantile of the sum is that of the whole batch. A mean of quantiles is not: experts
that half of the shards crowd and half leave alone look balanced in it.

The bins are a float's own: its exponent and the first two bits of its mantissa, so they are found
by adding, shifting and nothing else, the same on every device, and no scale of scores has to be
known. `bias` is inside: where the balance is nearly there, what is looked for is near 0, and there
the bins are finest. With the bias outside, MaxVio ends ten times higher at as many bins.

Letters: B batch, S sequence, E experts, K experts per token.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moejax.moe.token_sets import chosen_mask

BINS = 256
# Scores near 1/2 are this coarse in float32: below it there is nothing to tell apart.
FINEST = 2.0**-24
# With BINS / 2 bins a side that is 32 octaves: the end bins hold what lies beyond 2**8.
PER_OCTAVE = 4


def magnitudes() -> np.ndarray:
  """Returns where the bins of one sign begin, [BINS/2 + 2] f64, rising from 0.

  `FINEST` more than that is a float of two mantissa bits.
  """
  k = np.arange(BINS // 2 + 2)
  octave, quarter = 2.0 ** (k // PER_OCTAVE), k % PER_OCTAVE / PER_OCTAVE
  return FINEST * (octave * (1 + quarter) - 1)


# [BINS + 1] f32, rising. Bin BINS/2 holds 0 in its middle: the (K+1)-th choice itself is exactly 0,
# and must not lean. So 0 is no edge, and there is one bin more of negative numbers than of
# positive.
EDGES = np.r_[-magnitudes()[:0:-1], magnitudes()[1:-1]].astype(np.float32)


def bin_of(x: Array) -> Array:
  """Returns the bin of each number, i32; symmetric, and beyond the ends the end bins."""
  # |x| + FINEST is FINEST or more, so that FINEST's own bits begin the bin of 0.
  bits = jax.lax.bitcast_convert_type(jnp.abs(x) + FINEST, jnp.int32)
  finest = int(np.float32(FINEST).view(np.int32))
  # The bits of positive floats are ordered as the floats are. Of 23 bits of mantissa the first two
  # stay: PER_OCTAVE bins for each exponent.
  k = (bits - finest) >> (23 - PER_OCTAVE.bit_length() + 1)
  return jnp.clip(jnp.where(x < 0, -k, k), -BINS // 2, BINS // 2 - 1) + BINS // 2


def above_the_line(choice: Array, expert_ids: Array) -> Array:
  """Returns how far each choice lies above the line between a token's experts and the others.

  [B, S, E] f32. The line a is the best choice not taken that is no better than the least one taken:
  among all experts, the (K+1)-th largest. Where groups are left out, or an expert is dropped,
  better ones may go untaken: derived here, they count as on the line, so that above it are, but for
  ties, exactly the experts that the token went to.

  Args:
    choice: [B, S, E] f32, scores plus bias, of all experts.
    expert_ids: [B, S, K] i32, the experts taken; E: unassigned.
  """
  taken = chosen_mask(expert_ids, choice.shape[-1])
  least = jnp.where(taken, choice, jnp.inf).min(-1, keepdims=True)
  a = jnp.where(taken | (choice > least), -jnp.inf, choice).max(-1, keepdims=True)
  return jnp.where(taken, choice - a, jnp.minimum(choice - a, 0.0))


def histogram(choice: Array, expert_ids: Array, mask: Array) -> Array:
  """Returns for each expert how many tokens that count have it in each bin. [E, BINS] i32.

  Args:
    choice: [B, S, E] f32, scores plus bias, of all experts.
    expert_ids: [B, S, K] i32, the experts taken.
    mask: [B, S] bool, the tokens that count.
  """
  num_experts = choice.shape[-1]
  counts = jnp.zeros((num_experts, BINS), jnp.int32)
  bins = bin_of(above_the_line(choice, expert_ids))
  return counts.at[jnp.arange(num_experts), bins].add(mask[..., None].astype(jnp.int32))


def quantile(counts: Array, top_k: int) -> Array:
  """Returns the number that K of E tokens lie above, for each expert. [E, BINS] i32 -> [E] f32.

  How many lie below is compared as whole numbers, whatever the number of tokens; within a bin they
  are taken to lie evenly. Where no token lies between two numbers that both would do, it is the
  middle of them. Of 0 tokens it is anything finite.
  """
  num_experts = counts.shape[0]
  # T (E - K) / E tokens are to lie below. T times E overflows int32 for the largest batches, so T
  # is divided by E before it is multiplied.
  whole_experts, rest = jnp.divmod(counts[0].sum(), num_experts)
  extra, part = jnp.divmod(rest * (num_experts - top_k), num_experts)
  below = whole_experts * (num_experts - top_k) + extra  # and part / E of a token
  reached = jnp.cumsum(counts, axis=-1)

  def within(bins: Array) -> Array:
    """The number in each expert's bin [E] that `below` tokens lie below."""
    i = jnp.minimum(bins, BINS - 1)[:, None]
    inside = jnp.maximum(jnp.take_along_axis(counts, i, axis=-1), 1)
    before = jnp.take_along_axis(reached, i, axis=-1) - inside
    share = jnp.clip((below - before + part / num_experts) / inside, 0.0, 1.0)
    edges = jnp.asarray(EDGES)
    return (edges[i] + share * (edges[i + 1] - edges[i]))[:, 0]

  # The first bin by whose end enough tokens lie below, and the first by whose end more than enough
  # do: they differ where empty bins lie between two tokens that both would do.
  first = (reached < below + (part > 0)).sum(-1)  # [E]
  last = (reached <= below).sum(-1)  # [E]
  return 0.5 * (within(first) + within(last))
