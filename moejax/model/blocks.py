"""The blocks that a model is a stack of.

  x -> norm -> attention -> (norm) -> + x -> norm -> SwiGLU or MoE -> (norm) -> + x

Letters: B batch, S sequence, D model, E experts, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.attention import make_attention
from moejax.model.config import ModelConfig
from moejax.model.kv_cache import KVCache
from moejax.model.layers import Linear, RMSNorm
from moejax.model.remat import RESIDUAL
from moejax.moe.experts.ffn import SwiGLU
from moejax.moe.layer import MoE, MoEAux
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import constrain


class Route(NamedTuple):
  """What an MoE layer is given besides its input, by which its router chooses."""

  bias: Array  # [E] f32, added to scores where experts are chosen
  tokens: Tokens
  whole: dict[str, Array] | None  # loss -> [E] f32, see `Transformer.__call__`


class DenseBlock(nnx.Module):
  """x + attention(norm x), then x + SwiGLU(norm x)."""

  def __init__(self, key: Array, cfg: ModelConfig) -> None:
    keys, (std, out_std) = jax.random.split(key, 4), cfg.stds
    self.attention_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.attention = make_attention(
      keys[1], cfg.d_model, cfg.attention, cfg.norm_eps, std=std, out_std=out_std
    )
    self.attention_post_norm = make_post_norm(cfg, cfg.init.attention_gain)
    self.ffn_norm = RMSNorm(keys[2], cfg.d_model, cfg.norm_eps)
    self.ffn = SwiGLU(keys[3], cfg.d_model, cfg.d_ff, std, out_std)
    self.ffn_post_norm = make_post_norm(cfg, cfg.init.ffn_gain)

  def __call__(
    self, x: Array, batch: Batch, window: int, cache: KVCache | None
  ) -> tuple[Array, KVCache | None]:
    """Returns the residual [B, S, D] with both branches in it, and the cache with these tokens."""
    x, cache = add_attention(self, x, batch, window, cache)
    return add_branch(x, self.ffn(self.ffn_norm(x)), self.ffn_post_norm), cache


class MoEBlock(nnx.Module):
  """x + attention(norm x), then x + MoE(norm x)."""

  def __init__(self, key: Array, cfg: ModelConfig, scopes: frozendict, bias_rule: str) -> None:
    keys, (std, out_std) = jax.random.split(key, 4), cfg.stds
    self.attention_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.attention = make_attention(
      keys[1], cfg.d_model, cfg.attention, cfg.norm_eps, std=std, out_std=out_std
    )
    self.attention_post_norm = make_post_norm(cfg, cfg.init.attention_gain)
    self.moe_norm = RMSNorm(keys[2], cfg.d_model, cfg.norm_eps)
    self.moe = MoE(keys[3], cfg.d_model, cfg.moe, scopes, bias_rule, std=std, out_std=out_std)
    self.moe_post_norm = make_post_norm(cfg, cfg.init.ffn_gain)

  def __call__(
    self, x: Array, batch: Batch, window: int, cache: KVCache | None, route: Route
  ) -> tuple[Array, KVCache | None, MoEAux]:
    """Returns what a dense block does, and what the layer learnt."""
    x, cache = add_attention(self, x, batch, window, cache)
    y, aux = self.moe(self.moe_norm(x), route.bias, route.tokens, route.whole)
    return add_branch(x, y, self.moe_post_norm), cache, aux


def make_post_norm(cfg: ModelConfig, gain: float) -> RMSNorm | None:
  """Makes the norm of a branch's output, which starts at `gain / sqrt(L)`, or with gain 0 at 1.

  None without sandwich norm.
  """
  if not cfg.sandwich_norm:
    return None
  start = gain * cfg.num_layers**-0.5 if gain else 1.0
  # The key decides nothing: the scale is a constant.
  return RMSNorm(jax.random.key(0), cfg.d_model, cfg.norm_eps, start)


def add_attention(
  block: DenseBlock | MoEBlock, x: Array, batch: Batch, window: int, cache: KVCache | None
) -> tuple[Array, KVCache | None]:
  """Runs the attention half of a block. Returns the residual [B, S, D] and the cache."""
  normed = block.attention_norm(x)
  y, cache = block.attention(normed, batch.segment_ids, batch.positions, window, cache)
  x = add_branch(x, y, block.attention_post_norm)
  return checkpoint_name(x, RESIDUAL), cache


def add_branch(x: Array, y: Array, norm: RMSNorm | None) -> Array:
  """Adds a branch's output, after its norm if there is one, to the residual. [B, S, D]."""
  if norm is not None:
    y = norm(y)
  # The residual lies by rows after every branch, whatever layout the branch computed in.
  return constrain(x + y, 'batch', 'sequence', '')


class MTP(nnx.Module):
  """One depth of multi-token prediction (DeepSeek-V3, eq. 21 to 23).

  It is a projection of two states, and a block. The hidden state comes in and goes out after a
  norm: depth 1 reads the main model's after its final norm, and each further depth the one before
  it. Embedding and head are the main model's.
  """

  def __init__(self, key: Array, cfg: ModelConfig, scopes: frozendict, bias_rule: str) -> None:
    keys = jax.random.split(key, 5)
    self.token_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.hidden_norm = RMSNorm(keys[1], cfg.d_model, cfg.norm_eps)
    # Its output is a new residual, not a term of one: the std is that of what reads the residual.
    self.projection = Linear(keys[2], (2 * cfg.d_model, cfg.d_model), ('embed', ''), cfg.stds[0])
    self.block = MoEBlock(keys[3], cfg, scopes, bias_rule)
    self.norm = RMSNorm(keys[4], cfg.d_model, cfg.norm_eps)

  def __call__(
    self,
    hidden: Array,
    ahead: Array,
    batch: Batch,
    window: int,
    cache: KVCache | None,
    route: Route,
  ) -> tuple[Array, KVCache | None, MoEAux]:
    """Returns the hidden state of the next depth, [B, S, D], the cache, and what the layer learnt.

    Args:
      hidden: [B, S, D], the state of each token.
      ahead: [B, S, D], the embedding of the next token that the state has not seen.
    """
    # The token before the state: so published weights have the rows of the projection.
    both = jnp.concatenate([self.token_norm(ahead), self.hidden_norm(hidden)], axis=-1)
    x = constrain(self.projection(both), 'batch', 'sequence', '')
    x = checkpoint_name(x, RESIDUAL)
    x, cache, aux = self.block(x, batch, window, cache, route)
    return self.norm(x), cache, aux
