"""The blocks that a model is a stack of, and the config of it all.

  x -> norm -> attention -> (norm) -> + x -> norm -> SwiGLU or MoE -> (norm) -> + x

Letters: B batch, S sequence, D model, E experts, L layers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.attention import make_attention
from moejax.model.config import ModelConfig
from moejax.model.kv_cache import KVCache
from moejax.model.layers import Linear, RMSNorm
from moejax.moe.experts.ffn import SwiGLU
from moejax.moe.layer import MoE, MoEAux
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import constrain


class Route(NamedTuple):
  """What an MoE layer is given besides its input."""

  bias: Array  # [E] f32
  tokens: Tokens
  whole: dict[str, Array] | None  # loss -> [E] f32, see `Transformer.__call__`


class DenseBlock(nnx.Module):
  """x + attention(norm x), then x + SwiGLU(norm x)."""

  def __init__(self, key: Array, cfg: ModelConfig) -> None:
    keys, (std, out_std) = jax.random.split(key, 4), cfg.stds
    self.attention_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.attention = make_attention(keys[1], cfg.d_model, cfg.attention, cfg.norm_eps, std, out_std)
    self.attention_post_norm = post_norm(cfg, cfg.init.attention_gain)
    self.ffn_norm = RMSNorm(keys[2], cfg.d_model, cfg.norm_eps)
    self.ffn = SwiGLU(keys[3], cfg.d_model, cfg.d_ff, std, out_std)
    self.ffn_post_norm = post_norm(cfg, cfg.init.ffn_gain)

  def __call__(
    self, x: Array, batch: Batch, window: int, cache: KVCache | None
  ) -> tuple[Array, KVCache | None]:
    x, cache = add_attention(self, x, batch, window, cache)
    return add_branch(x, self.ffn(self.ffn_norm(x)), self.ffn_post_norm), cache


class MoEBlock(nnx.Module):
  """x + attention(norm x), then x + MoE(norm x)."""

  def __init__(self, key: Array, cfg: ModelConfig, scopes: frozendict, bias_rule: str) -> None:
    keys, (std, out_std) = jax.random.split(key, 4), cfg.stds
    self.attention_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.attention = make_attention(keys[1], cfg.d_model, cfg.attention, cfg.norm_eps, std, out_std)
    self.attention_post_norm = post_norm(cfg, cfg.init.attention_gain)
    self.moe_norm = RMSNorm(keys[2], cfg.d_model, cfg.norm_eps)
    self.moe = MoE(keys[3], cfg.d_model, cfg.moe, scopes, bias_rule, std, out_std)
    self.moe_post_norm = post_norm(cfg, cfg.init.ffn_gain)

  def __call__(
    self, x: Array, batch: Batch, window: int, cache: KVCache | None, route: Route
  ) -> tuple[Array, KVCache | None, MoEAux]:
    x, cache = add_attention(self, x, batch, window, cache)
    y, aux = self.moe(self.moe_norm(x), route.bias, route.tokens, route.whole)
    return add_branch(x, y, self.moe_post_norm), cache, aux


def post_norm(cfg: ModelConfig, gain: float) -> RMSNorm | None:
  """Of a branch's output, from `gain / sqrt(L)` or from 1; None without sandwich norm."""
  start = gain * cfg.num_layers**-0.5 if gain else 1.0
  return RMSNorm(jax.random.key(0), cfg.d_model, cfg.norm_eps, start) if cfg.sandwich_norm else None


def add_attention(
  block: DenseBlock | MoEBlock, x: Array, batch: Batch, window: int, cache: KVCache | None
) -> tuple[Array, KVCache | None]:
  """The attention half of a block."""
  y, cache = block.attention(
    block.attention_norm(x), batch.segment_ids, batch.positions, window, cache
  )
  return add_branch(x, y, block.attention_post_norm), cache


def add_branch(x: Array, y: Array, norm: RMSNorm | None) -> Array:
  """The residual with a branch's output in it."""
  return constrain(x + (y if norm is None else norm(y)), 'batch', 'sequence', '')


class MTP(nnx.Module):
  """One depth of multi-token prediction (DeepSeek-V3, eq. 21 to 23): a projection of two states, and a block.

  The hidden state comes in and goes out after a norm: depth 1 reads the main model's after its final norm, and each
  further depth the one before it. Embedding and head are the main model's.
  """

  def __init__(self, key: Array, cfg: ModelConfig, scopes: frozendict, bias_rule: str) -> None:
    keys = jax.random.split(key, 5)
    self.token_norm = RMSNorm(keys[0], cfg.d_model, cfg.norm_eps)
    self.hidden_norm = RMSNorm(keys[1], cfg.d_model, cfg.norm_eps)
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
    """hidden [B, S, D] of each token, ahead [B, S, D] the embedding of the next one not seen -> hidden [B, S, D]."""
    both = jnp.concatenate([self.token_norm(ahead), self.hidden_norm(hidden)], axis=-1)
    x, cache, aux = self.block(
      constrain(self.projection(both), 'batch', 'sequence', ''), batch, window, cache, route
    )
    return self.norm(x), cache, aux
