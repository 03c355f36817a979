"""Which experts are chosen, when it is not simply the best ones.

Limits to groups, dropped experts, noise, and selections that do not look at scores.

  choice (scores + bias) -> limit to groups, drop experts -> a row of SELECTIONS -> expert_ids

What does not follow from scores is a pure function of (seed, step, layer, row of the global batch,
place in the row), where padding takes no place: it is the same however the batch is cut, sharded or
padded on either side, and whether a row comes whole or token by token to a cache. There is nothing
to save, and evaluation, which has no key, has nothing random.

Letters: B batch, S sequence, D model, E experts, K experts per token, M groups of experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config.decimals import decimal_of
from moejax.moe.token_sets import chosen_mask, zero_padding

SINKHORN_ROUNDS = 8
# What a key is drawn for: folded into it, so that no two uses of randomness draw the same.
JITTER, NOISE, EXPERT_DROPOUT, SECOND = range(4)


class Tokens(NamedTuple):
  """What a router may know of the tokens besides their activations."""

  ids: Array | None  # [B, S] i32, of the vocabulary; None: not known
  mask: Array  # [B, S] bool, False for padding
  segments: Array  # [B, S] i32, document of each token in its row
  rows: Array  # [B] i32, each row's number in the global batch
  key: Array | None = None  # of this layer in this step; None: nothing is random
  replayed: Array | None = None  # [B, S, K] i32, recorded expert_ids to use again
  # [B, S] i32, each token's place in its row, see `places_in_row`; None: the row begins here
  places: Array | None = None


def whole_rows(mask: Array) -> Tokens:
  """Tokens of which nothing is known but which of them count; each row is one document.

  mask: [B, S] bool, False for padding. Hash selection, which looks at vocabulary ids, refuses them.
  """
  return Tokens(None, mask, mask.astype(jnp.int32), jnp.arange(mask.shape[0]))


def places_in_row(tokens: Tokens) -> Array:
  """Returns how many tokens of its row come before each token. [B, S] i32.

  Padding is not counted, so that a row has the same places whatever it is padded with; its own are
  of no consequence. Documents of one row are counted through: two of them must not draw the same.
  """
  if tokens.places is not None:
    return tokens.places
  return jnp.maximum(jnp.cumsum(tokens.mask, axis=1, dtype=jnp.int32) - 1, 0)


def draw_by_token(draw: Callable[[Array], Array], tokens: Tokens, purpose: int) -> Array:
  """Returns `draw(key)` of a key for each token: [B, S, ...] of a draw [...].

  The key follows from the row's number in the global batch and the place in the row. One key a row,
  and a draw for all its columns, would give a token other numbers where columns of padding, or a
  cache, lie before it.
  """
  key = jax.random.fold_in(tokens.key, purpose)

  def of_row(row: Array, places_S: Array) -> Array:
    row_key = jax.random.fold_in(key, row)
    return jax.vmap(lambda place: draw(jax.random.fold_in(row_key, place)))(places_S)

  return jax.vmap(of_row)(tokens.rows, places_in_row(tokens))


def jittered(x: Array, tokens: Tokens, epsilon: float) -> Array:
  """Returns `x` [B, S, D] times U(1 - epsilon, 1 + epsilon), entry by entry, in float32.

  Switch Transformer's input jitter. Not in x's dtype: bfloat16 has nothing between 1 and 1 + 2^-7,
  which makes five factors of epsilon=0.01, and one of 1e-3.
  """
  if not epsilon or tokens.key is None:
    return x
  low, high = 1 - epsilon, 1 + epsilon
  shape = x.shape[-1:]
  factor = draw_by_token(
    lambda key: jax.random.uniform(key, shape, jnp.float32, low, high), tokens, JITTER
  )
  return x.astype(jnp.float32) * factor


def noisy(logits: Array, std: Array | None, tokens: Tokens, top_k: int) -> tuple[Array, Array]:
  """Returns logits with noise, and how likely each expert is chosen when its noise is drawn anew.

  H = z + N(0, 1) std, and P(e) = Phi((z_e - k-th largest H of the others) / std_e): Shazeer et al.
  2017 (1701.06538), section on noisy top-k gating, derived here from what it says: e is chosen when
  its H is above that of all but K - 1 of the others; a bias that is in the choice is not in it. std
  is a learnt projection of the input. All [B, S, E] f32.
  """
  if std is None:
    raise ValueError('noise_std is None, and the router is noisy: use the std, [B, S, E] f32')
  if tokens.key is None:
    return logits, jnp.zeros_like(logits)
  shape, std = logits.shape[-1:], zero_padding(std, tokens.mask)
  draw = draw_by_token(lambda key: jax.random.normal(key, shape), tokens, NOISE)
  h = logits + draw * std
  # By min, not by slicing: of a slice XLA's CPU backend makes a whole sort.
  kth = jax.lax.top_k(h, top_k)[0].min(-1, keepdims=True)
  next_one = jax.lax.top_k(h, top_k + 1)[0].min(-1, keepdims=True)
  # The k-th largest of the others: for an expert among the best K it is the (K+1)-th of all.
  threshold = jnp.where(h >= kth, next_one, kth)
  return h, jax.scipy.stats.norm.cdf((logits - threshold) / jnp.maximum(std, 1e-6))


def limit_to_groups(choice: Array, num_groups: int, top_groups: int, group_best: int) -> Array:
  """Returns `choice` [B, S, E] with -inf outside the best `top_groups` groups.

  Groups are of neighbouring experts.
  A group is worth the sum of its `group_best` best entries: 2 in DeepSeek-V3's code (its text says
  the best K/M, which is the same for K/M = 2), 1, the largest, in DeepSeek-V2. Outside it is -inf,
  not 0: with a negative bias 0 would win. DeepSeek-V2 has 0 there, and softmax scores without a
  bias: those are above 0, so its choice is the same.
  """
  grouped = choice.reshape(*choice.shape[:-1], num_groups, -1)  # [B, S, M, E/M]
  worth = jax.lax.top_k(grouped, min(group_best, grouped.shape[-1]))[0].sum(-1)  # [B, S, M]
  kept = jax.lax.top_k(worth, top_groups)[1]  # [B, S, top_groups]
  inside = jax.nn.one_hot(kept, num_groups, dtype=jnp.bool_).any(-2)  # [B, S, M]
  return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(choice.shape)


def num_dropped(fraction: float, num_experts: int) -> int:
  """Returns how many experts expert dropout leaves out: round(fraction * E), a half to even."""
  return round(decimal_of(fraction) * num_experts)


def without_some(choice: Array, tokens: Tokens, fraction: float) -> Array:
  """Expert dropout: `choice` with -inf for round(fraction * E) experts. [B, S, E].

  They are drawn for the layer and step, the same for all rows.
  """
  dropped = num_dropped(fraction, choice.shape[-1])
  if not dropped or tokens.key is None:
    return choice
  order = jax.random.permutation(jax.random.fold_in(tokens.key, EXPERT_DROPOUT), choice.shape[-1])
  return jnp.where(order < dropped, -jnp.inf, choice)


def keep_second(weights: Array, tokens: Tokens) -> Array:
  """Returns which of two experts a token uses, [B, S, 2] bool; the first is always used.

  GShard (2006.16668): a second expert of weight g2 is used with probability min(1, 2 g2).
  """
  everything = jnp.ones(weights.shape, jnp.bool_)
  if tokens.key is None:
    return everything
  draw = draw_by_token(jax.random.uniform, tokens, SECOND)
  return everything.at[..., 1].set(draw < 2 * weights[..., 1])


def top_k_experts(log_scores: Array, choice: Array, tokens: Tokens | None, top_k: int) -> Array:
  """The K largest entries of `choice`; ties go to the lowest index. [B, S, K] i32."""
  del log_scores, tokens
  return jax.lax.top_k(choice, top_k)[1]


def expert_quota(tokens: int | Array, top_k: int, num_experts: int) -> int | Array:
  """Returns how many of a row's tokens each expert takes, n K / E rounded up: Zhou et al.'s k."""
  return -(-tokens * top_k // num_experts)


def expert_choice(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
  """Each expert takes its best tokens, ceil(n K / E) of each row's n. **Not causal.**

  Zhou et al., 2202.09368. The paper takes them from the whole batch; here a row is the set, so that
  the routing of a row does not depend on how the batch is cut. A token has 0 to E experts, so there
  are E places, and those that are left over are unassigned. Whether a token is taken depends on the
  tokens after it: such a model cannot be sampled from as it was trained. With a cache a row's set
  is the tokens at hand: a prompt is routed as in a forward pass of it alone, and each token after
  it as a row of its own. [B, S, E] i32.
  """
  num_experts = choice.shape[-1]
  # Ascending: the best token first, and padding last.
  cost = jnp.where(tokens.mask[..., None], -log_scores, jnp.inf)  # [B, S, E]
  # The argsort of an argsort is the place of each token in an expert's order.
  rank = jnp.argsort(jnp.argsort(cost, axis=1, stable=True), axis=1)  # [B, S, E]
  quota = expert_quota(tokens.mask.sum(1), top_k, num_experts)  # [B]
  taken = (rank < quota[:, None, None]) & tokens.mask[..., None]  # [B, S, E]
  # A token's best expert first, and behind them those that did not take it.
  order = jax.lax.top_k(jnp.where(taken, log_scores, -jnp.inf), num_experts)[1]
  return jnp.where(jnp.take_along_axis(taken, order, axis=-1), order, num_experts)


def sinkhorn(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
  """Top-K of the scores after Sinkhorn's normalisation of each row's [S, E] matrix. **Not causal.**

  Tokens are scaled to sum to 1 and experts to sum to n / E, in turns, SINKHORN_ROUNDS times, in log
  space: the transport that S-BASE routers take greedily from. A token's scale depends on all tokens
  of its row; with a cache on those at hand, as for `expert_choice`. [B, S, K] i32.
  """
  counts = tokens.mask[..., None]  # [B, S, 1]
  log_share = jnp.log(jnp.maximum(counts.sum(1, keepdims=True), 1) / choice.shape[-1])  # n / E
  # The floor keeps what counts above the -1e9 of what does not.
  plan = jnp.maximum(log_scores, -1e6)
  for _ in range(SINKHORN_ROUNDS):
    per_expert = jax.nn.logsumexp(jnp.where(counts, plan, -1e9), axis=1, keepdims=True)
    plan = plan - per_expert + log_share
    plan = plan - jax.nn.logsumexp(plan, axis=2, keepdims=True)
  return jax.lax.top_k(plan, top_k)[1]


def hashed(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
  """K experts fixed for each token of the vocabulary. [B, S, K] i32.

  Roller et al. 2021, hash layers, in their random form. The K largest of E pseudo-random numbers
  made from (token id, expert): murmur3's finaliser, whose avalanche is good enough to spread
  neighbouring ids.

  Raises:
    ValueError: the tokens have no ids.
  """
  del log_scores
  if tokens.ids is None:
    raise ValueError(
      "selection='hash' chooses by the ids of the vocabulary, and tokens.ids is None: "
      'use tokens=Tokens(ids=..., ...)'
    )
  num_experts = choice.shape[-1]
  ids = tokens.ids[..., None].astype(jnp.uint32)
  h = ids * jnp.uint32(num_experts) + jnp.arange(num_experts, dtype=jnp.uint32)  # [B, S, E]
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    h = (h ^ (h >> shift)) * jnp.uint32(factor)
  h = h ^ (h >> 16)
  # Halved, so that it fits a signed integer: the order of what is left is all that is asked for.
  return jax.lax.top_k((h >> 1).astype(jnp.int32), top_k)[1]


def uniform(log_scores: Array, choice: Array, tokens: Tokens, top_k: int) -> Array:
  """Experts in turn, by the place in the row, whatever the token. [B, S, K] i32.

  A row's load is even to one copy, padded or not, to measure speed with.
  """
  del log_scores
  num_experts = choice.shape[-1]
  # By the place within a turn: K times a place in a long text would overflow.
  first_BS1 = (places_in_row(tokens) % num_experts)[..., None] * top_k
  return ((first_BS1 + jnp.arange(top_k)) % num_experts).astype(jnp.int32)


def margin(choice: Array, expert_ids: Array) -> Array:
  """Returns the least choice taken minus the best one not taken, [B, S].

  inf where no expert is left that could have been taken, or none was taken: nothing to compare.
  """
  taken = chosen_mask(expert_ids, choice.shape[-1])  # [B, S, E]
  return jnp.where(taken, choice, jnp.inf).min(-1) - jnp.where(taken, -jnp.inf, choice).max(-1)


class Selection(NamedTuple):
  """A way to choose experts, and what it promises."""

  # (log_scores [B, S, E], choice [B, S, E], tokens, top_k) -> expert_ids [B, S, K]; E: unassigned.
  choose: Callable[[Array, Array, Tokens, int], Array]
  causal: bool  # tokens after t change nothing at t
  takes_bias: bool  # the router bias has a say
  experts_choose: bool = False  # each takes `expert_quota` of each row


SELECTIONS: dict[str, Selection] = {
  'expert_choice': Selection(expert_choice, causal=False, takes_bias=False, experts_choose=True),
  'hash': Selection(hashed, causal=True, takes_bias=False),
  'sinkhorn': Selection(sinkhorn, causal=False, takes_bias=False),
  'top_k': Selection(top_k_experts, causal=True, takes_bias=True),
  'uniform': Selection(uniform, causal=True, takes_bias=False),
}
