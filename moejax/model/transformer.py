"""The model: embed -> dense blocks -> MoE blocks -> norm -> head; each kind of block one stack that `scan` runs.

Beside the head, blocks of multi-token prediction (MTP): each takes the hidden state of the one before and the embedding
of the token ahead, and predicts the token after that (DeepSeek-V3, section 2.2).

Letters: B batch, S sequence, D model, V vocab, L layers (of one kind), E experts, p layers in a turn of the scan.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.blocks import MTP, DenseBlock, MoEBlock, Route
from moejax.model.config import REMAT_POLICIES, ModelConfig
from moejax.model.kv_cache import KVCache, empty_cache
from moejax.model.layers import Embed, Linear, RMSNorm
from moejax.moe.layer import MoEAux
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import constrain

# stack of blocks -> one of each place in a turn of the scan, of L / p layers; of each depth under 'mtp'
Caches = dict[str, tuple[KVCache, ...]]


class Output(NamedTuple):
  """What a forward pass gives. Logits are made by `Transformer.logits`, or chunk by chunk in the loss."""

  hidden: Array  # [B, S, D] after the final norm
  aux: MoEAux  # of each MoE layer, stacked: [L, ...]
  cache: Caches | None
  mtp_hidden: tuple[Array, ...] = ()  # of each depth of multi-token prediction, [B, S, D]


class Draws(NamedTuple):
  """What random numbers of a step follow from: never from how its batch is cut."""

  key: Array  # of the step
  rows: Array  # [B] i32, each row's number in the global batch


class Transformer(nnx.Module):
  """A decoder with experts.

  scopes: the balance losses that MoE layers compute, from BalanceConfig.scopes; empty outside training.
  bias_rule: whose observations they make.
  """

  def __init__(
    self, key: Array, cfg: ModelConfig, scopes: frozendict = frozendict(), bias_rule: str = ''
  ) -> None:
    keys, std = jax.random.split(key, 6), cfg.stds[0]
    self.cfg = cfg
    self.embed = Embed(keys[0], cfg.vocab_size, cfg.d_model, cfg.init.embed_std or std)
    if cfg.num_dense_layers:
      self.dense_blocks = jax.vmap(lambda k: DenseBlock(k, cfg))(
        jax.random.split(keys[1], cfg.num_dense_layers)
      )
    self.blocks = jax.vmap(lambda k: MoEBlock(k, cfg, scopes, bias_rule))(
      jax.random.split(keys[2], cfg.num_layers - cfg.num_dense_layers)
    )
    self.norm = RMSNorm(keys[3], cfg.d_model, cfg.norm_eps)
    if not cfg.tie_embeddings:
      self.head = Linear(keys[4], (cfg.d_model, cfg.vocab_size), ('embed', 'vocab'), std)
    if cfg.mtp_depth:
      self.mtp = jax.vmap(lambda k: MTP(k, cfg, scopes, bias_rule))(
        jax.random.split(keys[5], cfg.mtp_depth)
      )

  def head_weights(self) -> Array:
    """[D, V] f32."""
    return self.embed.table[...].T if self.cfg.tie_embeddings else self.head.w[...]

  def logits(self, hidden: Array) -> Array:
    """[B, S, D] -> [B, S, V] f32. All of them: for decoding, not for training."""
    return jnp.einsum(
      'bsd,dv->bsv',
      hidden,
      self.head_weights().astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )

  def __call__(
    self,
    batch: Batch,
    router: Array,
    cache: Caches | None = None,
    whole: dict[str, Array] | None = None,
    draws: Draws | None = None,
    replayed: Array | None = None,
  ) -> Output:
    """Runs all layers; those of multi-token prediction only without a cache: see `draft`.

    Args:
      batch: tokens, segment_ids and positions are read; segment 0 is padding, which counts nowhere.
      router: [L, E] f32, the bias of each MoE layer.
      cache: from `empty_caches`, to go on from; None to attend within the batch alone.
      whole: loss -> [L, E] f32, for balance losses whose sets are larger than the batch; None: no losses at all.
      draws: what routers draw random numbers from; None: nothing is random.
      replayed: [L, B, S, K] i32, expert_ids to use instead of choosing any (`MoEAux.expert_ids` of another run).
    """
    cfg, caches = self.cfg, {}
    rows = draws.rows if draws else jnp.arange(batch.tokens.shape[0])
    keys = (
      jax.vmap(lambda layer: jax.random.fold_in(draws.key, layer))(jnp.arange(cfg.num_moe_layers))
      if draws
      else None
    )
    tokens = Tokens(batch.tokens, batch.segment_ids > 0, batch.segment_ids, rows)
    embedded = constrain(self.embed(batch.tokens, jnp.dtype(cfg.dtype)), 'batch', 'sequence', '')
    x, per_layer = embedded, (router, whole, keys, replayed)

    def route_of(
      bias: Array, whole: dict[str, Array] | None, key: Array | None, ids: Array | None
    ) -> Route:
      return Route(bias, tokens._replace(key=key, replayed=ids), whole)

    def dense(
      x: Array, layer: DenseBlock, window: int, cache: KVCache | None
    ) -> tuple[Array, KVCache | None, None]:
      return *layer(x, batch, window, cache), None

    def moe(
      x: Array, layer: tuple, window: int, cache: KVCache | None
    ) -> tuple[Array, KVCache | None, MoEAux]:
      return layer[0](x, batch, window, cache, route_of(*layer[1]))

    if cfg.num_dense_layers:
      x, caches['dense_blocks'], _ = self.scan('dense_blocks', dense, x, self.dense_blocks, cache)
    in_blocks = jax.tree.map(lambda a: a[: cfg.num_layers - cfg.num_dense_layers], per_layer)
    x, caches['blocks'], aux = self.scan('blocks', moe, x, (self.blocks, in_blocks), cache)
    hidden, states = self.norm(x), []
    for depth in range(cfg.mtp_depth if cache is None else 0):
      route = route_of(*jax.tree.map(lambda a, d=depth: a[d - cfg.mtp_depth], per_layer))
      state, _, more = self.ahead(
        depth, (hidden, *states)[-1], shifted(embedded, batch, depth + 1), batch, None, route
      )
      states.append(state)
      aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), aux, more)
    return Output(hidden, aux, caches if cache else None, tuple(states))

  def ahead(
    self, depth: int, hidden: Array, ahead: Array, batch: Batch, cache: KVCache | None, route: Route
  ) -> tuple[Array, KVCache | None, MoEAux]:
    """One depth of multi-token prediction, under the remat policy; see MTP."""
    cfg = self.cfg
    windows = cfg.attention.windows

    def body(mtp: MTP, hidden: Array, ahead: Array) -> tuple[Array, KVCache | None, MoEAux]:
      return mtp(
        hidden, ahead, batch, windows[(cfg.num_layers + depth) % len(windows)], cache, route
      )

    if cfg.remat != 'none':
      body = jax.checkpoint(body, policy=REMAT_POLICIES[cfg.remat])
    return body(jax.tree.map(lambda a: a[depth], self.mtp), hidden, ahead)

  def draft(
    self, depth: int, hidden: Array, tokens: Array, batch: Batch, router: Array, cache: KVCache
  ) -> tuple[Array, KVCache]:
    """One depth of multi-token prediction from a cache, for decoding: 0 for the first.

    Args:
      hidden: [B, S, D], as the model or the depth before gave it.
      tokens: [B, S], the next one that these have not seen.
      batch: segment_ids and positions are read, of the places that hidden is of.
    """
    mask = batch.segment_ids > 0
    seen = Tokens(batch.tokens, mask, batch.segment_ids, jnp.arange(tokens.shape[0]))
    embedded = self.embed(tokens, jnp.dtype(self.cfg.dtype))
    hidden, cache, _ = self.ahead(
      depth, hidden, embedded, batch, cache, Route(router[depth - self.cfg.mtp_depth], seen, None)
    )
    return hidden, cache

  def scan(
    self, stack: str, body: Callable, x: Array, layers: object, caches: Caches | None
  ) -> tuple[Array, tuple[KVCache, ...] | None, object]:
    """`jax.lax.scan` over the stacked layers, p in a turn, each under the remat policy. -> x, caches, what layers gave.

    p is the period of the attention windows, which are static: every layer of a place in the turn has the same.
    """
    cfg, windows = self.cfg, turn_windows(stack, self.cfg)
    period = len(windows)

    def turn(carry: tuple, these: tuple) -> tuple[tuple, object]:
      (x, kept), (at, layers), gave = carry, these, []
      for i, window in enumerate(windows):

        def one(x: Array, layer: object, cache: KVCache | None, window: int = window) -> tuple:
          return body(x, layer, window, cache)

        if cfg.remat != 'none':
          one = jax.checkpoint(one, policy=REMAT_POLICIES[cfg.remat])
        layer = layers if period == 1 else jax.tree.map(lambda a, i=i: a[i], layers)
        x, cache, out = one(x, layer, kept and kept[i]._replace(layer=at))
        kept, gave = kept and (*kept[:i], cache, *kept[i + 1 :]), [*gave, out]
      return (x, kept), jax.tree.map(lambda *a: jnp.stack(a), *gave)

    # Without an axis of 1 for a period of 1: XLA's CPU backend would copy all parameters, to lay that axis elsewhere.
    turns = (
      layers if period == 1 else jax.tree.map(lambda a: a.reshape(-1, period, *a.shape[1:]), layers)
    )
    at = caches and jnp.arange(stack_sizes(cfg)[stack] // period)
    (x, kept), gave = jax.lax.scan(
      turn, (x, caches and caches[stack]), (at, turns), unroll=max(1, cfg.unroll // period)
    )
    return x, kept, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), gave)


def shifted(embedded: Array, batch: Batch, by: int) -> Array:
  """The embedding of the token `by` places on, 0 where that is not in the same document. [B, S, D]."""
  pad = [(0, 0), (0, by)]
  same = jnp.pad(batch.segment_ids[:, by:], pad) == batch.segment_ids
  return jnp.where(same[..., None], jnp.pad(embedded[:, by:], [*pad, (0, 0)]), 0)


def stack_sizes(cfg: ModelConfig) -> dict[str, int]:
  """Stack of blocks -> its layers, in the order in which they run."""
  sizes = {'dense_blocks': cfg.num_dense_layers, 'blocks': cfg.num_layers - cfg.num_dense_layers}
  return {name: size for name, size in sizes.items() if size}


def turn_windows(stack: str, cfg: ModelConfig) -> tuple[int, ...]:
  """The window of each layer in a turn of the scan: the whole stack at once, where the period does not divide it."""
  windows, first, count = (
    cfg.attention.windows,
    cfg.num_dense_layers * (stack == 'blocks'),
    stack_sizes(cfg)[stack],
  )
  period = len(windows) if count % len(windows) == 0 else count
  return tuple(windows[(first + i) % len(windows)] for i in range(period))


def empty_caches(batch: int, length: int, cfg: ModelConfig, depths: int = 0) -> Caches:
  """Room for `length` tokens in each of `batch` rows, for every layer and so many depths of multi-token prediction."""

  def of(layers: int, window: int) -> KVCache:
    return empty_cache(layers, batch, length, cfg.attention, window, jnp.dtype(cfg.dtype))

  windows, caches = cfg.attention.windows, {}
  for stack, count in stack_sizes(cfg).items():
    turn = turn_windows(stack, cfg)
    caches[stack] = tuple(of(count // len(turn), window) for window in turn)
  if depths:
    caches['mtp'] = tuple(
      of(1, windows[(cfg.num_layers + depth) % len(windows)]) for depth in range(depths)
    )
  return caches
