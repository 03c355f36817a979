"""The model: embed -> blocks, dense or with experts -> norm -> head.

Each kind of block is one stack of parameters; scans run them. Beside the head there are blocks
of multi-token prediction (MTP): each takes the hidden state of the one before and the embedding of
the token ahead, and predicts the token after that (DeepSeek-V3, section 2.2).

Letters: B batch, S sequence, D model, V vocab, L layers with experts, E experts, K experts per
token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.blocks import MTP, DenseBlock, MoEBlock, Route
from moejax.model.config import ModelConfig
from moejax.model.kv_cache import KVCache, empty_cache
from moejax.model.layer_runs import layer_runs, stack_layers
from moejax.model.layer_stack import Caches, LayerStack, layer_of, mtp_window, run_layers
from moejax.model.layers import Embed, Linear, RMSNorm
from moejax.model.remat import checkpointed
from moejax.moe.layer import MoEAux
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import constrain

# x [B, S, D], the cache, and what a layer with experts learnt
LayerOutput = tuple[Array, KVCache | None, MoEAux | None]


class Output(NamedTuple):
  """What a forward pass gives. Logits are made by `Transformer.logits`, or by the loss."""

  hidden: Array  # [B, S, D] after the final norm
  aux: MoEAux  # of each MoE layer, stacked: [L, ...]
  cache: Caches | None
  mtp_hidden: tuple[Array, ...] = ()  # of each depth of multi-token prediction, [B, S, D]


class Draws(NamedTuple):
  """What the random numbers of a step follow from: never from how its batch is cut."""

  key: Array  # of the step
  rows: Array  # [B] i32, each row's number in the global batch


class PerLayer(NamedTuple):
  """What each MoE layer is given of its own: [L, ...] of all layers, or without L of one."""

  bias: Array  # [L, E] f32, added to scores where experts are chosen
  whole: dict[str, Array] | None  # see `Transformer.__call__`
  key: Array | None
  replayed: Array | None  # [L, B, S, K] i32


class Transformer(nnx.Module):
  """A decoder with experts.

  scopes: the balance losses that MoE layers compute, from BalanceConfig.scopes; empty outside
    training.
  bias_rule: a row of BIAS_RULES, whose observations they make; '' for none.
  """

  def __init__(
    self, key: Array, cfg: ModelConfig, scopes: frozendict = frozendict(), bias_rule: str = ''
  ) -> None:
    keys, std = jax.random.split(key, 6), cfg.stds[0]
    self.cfg = cfg
    self.embed = Embed(keys[0], cfg.vocab_size, cfg.d_model, cfg.init.embed_std or std)
    # Layers that are alike are made by vmap, each from its own key: parameters are [L, ...].
    stacks = stack_layers(cfg)
    if 'dense_blocks' in stacks:
      dense_keys = jax.random.split(keys[1], len(stacks['dense_blocks']))
      self.dense_blocks = jax.vmap(lambda k: DenseBlock(k, cfg))(dense_keys)
    block_keys = jax.random.split(keys[2], len(stacks['blocks']))
    self.blocks = jax.vmap(lambda k: MoEBlock(k, cfg, scopes, bias_rule))(block_keys)
    self.norm = RMSNorm(keys[3], cfg.d_model, cfg.norm_eps)
    if not cfg.tie_embeddings:
      self.head = Linear(keys[4], (cfg.d_model, cfg.vocab_size), ('embed', 'vocab'), std)
    if cfg.mtp_depth:
      mtp_keys = jax.random.split(keys[5], cfg.mtp_depth)
      self.mtp = jax.vmap(lambda k: MTP(k, cfg, scopes, bias_rule))(mtp_keys)

  def head_weights(self) -> Array:
    """Returns the matrix that makes logits, [D, V] f32; of tied embeddings it is the transpose."""
    return self.embed.table[...].T if self.cfg.tie_embeddings else self.head.w[...]

  def logits(self, hidden: Array) -> Array:
    """Makes logits of all tokens, [B, S, D] -> [B, S, V] f32: for decoding, not for training."""
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
    rows_with_ids: int | None = None,
  ) -> Output:
    """Runs all layers; those of multi-token prediction only without a cache: see `draft`.

    Args:
      batch: tokens, segment_ids and positions are read; segment 0 is padding, which counts nowhere.
      router: [L, E] f32, the bias of each MoE layer.
      cache: from `empty_caches`, to go on from, a document a row; None: attend within the batch.
      whole: loss -> [L, E], for sets larger than the batch; None: no losses, and no capacity.
      draws: what routers draw random numbers from; None: nothing is random.
      replayed: [L, B, S, K] i32, `MoEAux.expert_ids` of another run to use again; None: choose.
      rows_with_ids: of how many of the first rows `MoEAux.expert_ids` are kept; None: of all.
    """
    cfg, mtp_hidden = self.cfg, []
    if draws is None:
      rows, keys = jnp.arange(batch.tokens.shape[0]), None
    else:
      rows, keys = draws.rows, layer_keys(draws.key, cfg.num_moe_layers)
    tokens = routed_tokens(batch, rows, cache is not None)
    embedded = constrain(self.embed(batch.tokens, jnp.dtype(cfg.dtype)), 'batch', 'sequence', '')
    x, per_layer = embedded, PerLayer(router, whole, keys, replayed)

    def route_of(layer: PerLayer) -> Route:
      tokens_of = tokens._replace(key=layer.key, replayed=layer.replayed)
      return Route(layer.bias, tokens_of, layer.whole)

    def dense(x: Array, block: DenseBlock, window: int, cache: KVCache | None) -> LayerOutput:
      return *block(x, batch, window, cache), None

    def moe(
      x: Array, layer: tuple[MoEBlock, PerLayer], window: int, cache: KVCache | None
    ) -> LayerOutput:
      block, own = layer
      return keep_ids(block(x, batch, window, cache, route_of(own)), rows_with_ids)

    in_blocks = jax.tree.map(lambda a: a[: sum(cfg.has_experts)], per_layer)
    stacks = {'blocks': LayerStack(moe, (self.blocks, in_blocks))}
    if not all(cfg.has_experts):
      stacks['dense_blocks'] = LayerStack(dense, self.dense_blocks)
    x, caches, aux = run_layers(x, stacks, caches=cache, cfg=cfg)
    hidden = state = self.norm(x)
    for depth in range(cfg.mtp_depth if cache is None else 0):
      # Blocks of multi-token prediction are the last of all that is [L, ...].
      route = route_of(layer_of(per_layer, depth - cfg.mtp_depth))
      ahead = shifted(embedded, batch, depth + 1)
      ran = self.run_mtp(depth, state, ahead, batch, cache=None, route=route)
      state, _, layer_aux = keep_ids(ran, rows_with_ids)
      mtp_hidden.append(state)
      aux = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), aux, layer_aux)
    return Output(hidden, aux, caches, tuple(mtp_hidden))

  def run_mtp(
    self, depth: int, hidden: Array, ahead: Array, batch: Batch, cache: KVCache | None, route: Route
  ) -> tuple[Array, KVCache | None, MoEAux]:
    """Runs one depth of multi-token prediction under the remat policy; see MTP."""
    cfg = self.cfg

    def body(mtp: MTP, hidden: Array, ahead: Array) -> tuple[Array, KVCache | None, MoEAux]:
      return mtp(hidden, ahead, batch, mtp_window(depth, cfg), cache, route=route)

    return checkpointed(body, cfg.remat)(layer_of(self.mtp, depth), hidden, ahead)

  def draft(
    self, depth: int, hidden: Array, tokens: Array, batch: Batch, router: Array, cache: KVCache
  ) -> tuple[Array, KVCache]:
    """Runs one depth of multi-token prediction from a cache, for decoding.

    Args:
      depth: 0 for the first.
      hidden: [B, S, D], as the model or the depth before gave it.
      tokens: [B, S], the next one that these have not seen.
      batch: segment_ids and positions are read, of the places that hidden is of.
      router: [L, E] f32, the bias of each MoE layer.
      cache: of this depth.

    Returns:
      hidden [B, S, D], from which this depth's logits are made, and the cache with these tokens.
    """
    seen = routed_tokens(batch, jnp.arange(tokens.shape[0]), has_cache=True)
    embedded = self.embed(tokens, jnp.dtype(self.cfg.dtype))
    route = Route(router[depth - self.cfg.mtp_depth], seen, None)
    hidden, cache, _ = self.run_mtp(depth, hidden, embedded, batch, cache=cache, route=route)
    return hidden, cache


def routed_tokens(batch: Batch, rows: Array, has_cache: bool) -> Tokens:
  """What routers may know of a batch's tokens; with a cache, of rows that began before it."""
  # A row with a cache is one document, so that a place in the document is one in the row.
  places = batch.positions if has_cache else None
  mask = batch.segment_ids > 0
  return Tokens(batch.tokens, mask, batch.segment_ids, rows, places=places)


def keep_ids(ran: LayerOutput, rows: int | None) -> LayerOutput:
  """Returns what a layer gave, with the expert_ids of so many first rows alone; None: of all.

  Stacked over layers, the ids of all tokens are a large array, of which a probe looks at a part.
  """
  x, cache, aux = ran
  return x, cache, aux._replace(expert_ids=aux.expert_ids[:rows])


def layer_keys(key: Array, layers: int) -> Array:
  """Makes a random key for each layer from that of a step, [L]."""
  return jax.vmap(lambda layer: jax.random.fold_in(key, layer))(jnp.arange(layers))


def shifted(embedded: Array, batch: Batch, by: int) -> Array:
  """Embeds the token `by` places on, [B, S, D]: 0 where that is not in the same document."""
  pad = [(0, 0), (0, by)]
  same = jnp.pad(batch.segment_ids[:, by:], pad) == batch.segment_ids
  return jnp.where(same[..., None], jnp.pad(embedded[:, by:], [*pad, (0, 0)]), 0)


def empty_caches(batch: int, length: int, cfg: ModelConfig, depths: int = 0) -> Caches:
  """Makes room for `length` tokens in each of `batch` rows.

  The room is for every layer, and for so many depths of multi-token prediction.
  """

  def caches_of(layers: int, windows: tuple[int, ...]) -> tuple[KVCache, ...]:
    dtype = jnp.dtype(cfg.dtype)
    return tuple(
      empty_cache(layers, batch, length, cfg.attention, window=window, dtype=dtype)
      for window in windows
    )

  in_layers: list[KVCache] = []
  for run in layer_runs(cfg):
    in_layers += caches_of(run.turns, tuple(kind.window for kind in run.turn))
  caches = {'layers': tuple(in_layers)}
  if depths:
    caches['mtp'] = caches_of(1, tuple(mtp_window(depth, cfg) for depth in range(depths)))
  return caches
