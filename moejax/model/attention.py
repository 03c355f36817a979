"""Causal self-attention, grouped-query or latent, and the cache that decoding keeps.

  x -> q, k, v -> norm, clip -> rope -> attend -> output projection

Letters: B batch, S tokens, T places of a cache, D model, H heads, J key-value heads, d head width; of latent attention
R rank, n and r channels of a head without and with position, v of a value.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.model.attention_cores import attend, core
from moejax.model.config import AttentionConfig
from moejax.model.kv_cache import KVCache, append
from moejax.model.layers import Linear, RMSNorm
from moejax.model.rope import rotate, softmax_factor
from moejax.sharding.logical_axes import constrain
from moejax.sharding.params import constant_init, param


class Attention(nnx.Module):
  """Grouped-query attention (Ainslie et al. 2023) with rotary positions and document masking."""

  def __init__(
    self,
    key: Array,
    d_model: int,
    cfg: AttentionConfig,
    norm_eps: float,
    std: float,
    out_std: float,
  ) -> None:
    keys = jax.random.split(key, 4)
    self.cfg = cfg
    width, kv_width = cfg.num_heads * cfg.d_head, cfg.num_kv_heads * cfg.d_head
    self.q = Linear(keys[0], (d_model, width), ('embed', 'heads'), std, cfg.qkv_bias)
    self.k = Linear(keys[1], (d_model, kv_width), ('embed', 'heads'), std, cfg.qkv_bias)
    self.v = Linear(keys[2], (d_model, kv_width), ('embed', 'heads'), std, cfg.qkv_bias)
    self.out = Linear(keys[3], (width, d_model), ('heads', 'embed'), out_std, cfg.out_bias)
    if cfg.qk_norm:
      whole = cfg.qk_norm == 'projection'
      self.q_norm = RMSNorm(key, width if whole else cfg.d_head, norm_eps)
      self.k_norm = RMSNorm(key, kv_width if whole else cfg.d_head, norm_eps)
    if cfg.sinks:
      self.sinks = param(key, (cfg.num_heads,), ('norm',), constant_init(0.0))

  def heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
    """q [B, S, H, d], rotated; k, rotated, and v [B, S, J, d]."""
    cfg = self.cfg
    q, k, v = self.q(x), self.k(x), self.v(x)
    if cfg.qk_norm == 'projection':
      q, k = self.q_norm(q), self.k_norm(k)
    q, k, v = (a.reshape(*a.shape[:2], -1, cfg.d_head) for a in (q, k, v))
    if cfg.qk_norm == 'head':
      q, k = self.q_norm(q), self.k_norm(k)
    if cfg.clip_qkv:
      q, k, v = (jnp.clip(a, -cfg.clip_qkv, cfg.clip_qkv) for a in (q, k, v))
    return rotate(q, positions, cfg.rope), rotate(k, positions, cfg.rope), v

  def __call__(
    self, x: Array, segments: Array, positions: Array, window: int = 0, cache: KVCache | None = None
  ) -> tuple[Array, KVCache | None]:
    """x [B, S, D], segments and positions [B, S] -> y [B, S, D] and the cache with these tokens in it."""
    cfg = self.cfg
    scale = cfg.d_head**-0.5 * softmax_factor(cfg.rope)
    sinks = self.sinks[...] if cfg.sinks else None
    q, k, v = self.heads(x, positions)
    if cache is None:
      q, k, v = (constrain(a, 'batch', 'sequence', 'heads', '') for a in (q, k, v))
      y = core(cfg.implementation)(q, k, v, segments, window, scale, sinks)
    else:
      cache, (k, v), mask = append(cache, (k, v), segments, window)
      y = attend(q, k, v, mask, scale, sinks)
    return self.out(y.reshape(*x.shape[:2], -1)), cache


class LatentAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1; DeepSeek-V3, 2412.19437, section 2.1.1).

  Two forms of the same equations. Without a cache, keys and values are made from the latent: fewer multiplications.
  With one, the latents are attended to as they are, as one key-value head of R + r channels: what would make keys of
  them is multiplied into the queries, and what would make values, into the result.
  """

  def __init__(
    self, key: Array, d_model: int, cfg: AttentionConfig, std: float, out_std: float
  ) -> None:
    keys, latent, heads = jax.random.split(key, 5), cfg.latent, cfg.num_heads
    self.cfg = cfg
    q_width, kv_width = heads * (cfg.d_head + latent.d_rope), heads * (cfg.d_head + latent.d_value)
    # Ranks are split as `embed` is where heads are made of them: these are a model's largest matrices but the experts.
    if latent.q_rank:
      self.q_a = Linear(keys[0], (d_model, latent.q_rank), ('embed', ''), std, cfg.qkv_bias)
      self.q_a_norm = RMSNorm(key, latent.q_rank, latent.norm_eps)
      self.q_b = Linear(keys[1], (latent.q_rank, q_width), ('embed', 'heads'), std)
    else:
      self.q = Linear(keys[1], (d_model, q_width), ('embed', 'heads'), std)
    self.kv_a = Linear(
      keys[2], (d_model, latent.kv_rank + latent.d_rope), ('embed', ''), std, cfg.qkv_bias
    )
    self.kv_a_norm = RMSNorm(key, latent.kv_rank, latent.norm_eps)
    self.kv_b = Linear(keys[3], (latent.kv_rank, kv_width), ('embed', 'heads'), std)
    self.out = Linear(
      keys[4], (heads * latent.d_value, d_model), ('heads', 'embed'), out_std, cfg.out_bias
    )

  def __call__(
    self, x: Array, segments: Array, positions: Array, window: int = 0, cache: KVCache | None = None
  ) -> tuple[Array, KVCache | None]:
    """As of grouped-query attention: x [B, S, D] -> y [B, S, D] and the cache with these tokens in it."""
    cfg, (b, s, _) = self.cfg, x.shape
    scale = (cfg.d_head + cfg.latent.d_rope) ** -0.5 * softmax_factor(cfg.rope)
    q = self.q_b(self.q_a_norm(self.q_a(x))) if cfg.latent.q_rank else self.q(x)
    q, q_rope = jnp.split(
      q.reshape(b, s, cfg.num_heads, -1), [cfg.d_head], axis=-1
    )  # [B, S, H, n], [B, S, H, r]
    kv, k_rope = jnp.split(self.kv_a(x), [cfg.latent.kv_rank], axis=-1)  # [B, S, R], [B, S, r]
    kv = self.kv_a_norm(kv)
    q_rope, k_rope = (rotate(a, positions, cfg.rope) for a in (q_rope, k_rope[:, :, None]))
    if cache is None:
      k, v = self.keys_and_values(kv, k_rope)
      q, k, v = (
        constrain(a, 'batch', 'sequence', 'heads', '')
        for a in (jnp.concatenate([q, q_rope], -1), k, v)
      )
      y = core(cfg.implementation)(q, k, v, segments, window, scale, None)
    else:
      k_half, v_half = self.key_and_value_projections(x.dtype)
      q = jnp.concatenate([jnp.einsum('bshn,rhn->bshr', q, k_half), q_rope], -1)
      cache, (kv,), mask = append(
        cache, (jnp.concatenate([kv[:, :, None], k_rope], -1),), segments, window
      )
      # The result's last r channels are the sum of keys, and dropped: cheaper than a copy of the cache without them.
      y = jnp.einsum(
        'bshr,rhv->bshv', attend(q, kv, kv, mask, scale, None)[..., : cfg.latent.kv_rank], v_half
      )
    return self.out(y.reshape(b, s, -1)), cache

  def keys_and_values(self, kv: Array, k_rope: Array) -> tuple[Array, Array]:
    """Latents [B, S, R] and the one rotated key of all heads [B, S, 1, r] -> [B, S, H, n + r], [B, S, H, v]."""
    kv = self.kv_b(kv).reshape(*kv.shape[:2], self.cfg.num_heads, -1)
    k, v = jnp.split(kv, [self.cfg.d_head], axis=-1)
    return jnp.concatenate([k, jnp.broadcast_to(k_rope, (*k.shape[:-1], k_rope.shape[-1]))], -1), v

  def key_and_value_projections(self, dtype: jnp.dtype) -> list[Array]:
    """What makes keys of a latent, and what makes values. [R, H, n], [R, H, v]."""
    w = self.kv_b.w[...].astype(dtype)
    return jnp.split(w.reshape(w.shape[0], self.cfg.num_heads, -1), [self.cfg.d_head], axis=-1)


def make_attention(
  key: Array, d_model: int, cfg: AttentionConfig, norm_eps: float, std: float, out_std: float
) -> Attention | LatentAttention:
  """The attention of a config. norm_eps: of qk_norm.  out_std: of the projection that writes to the residual."""
  if cfg.latent.kv_rank:
    return LatentAttention(key, d_model, cfg, std, out_std)
  return Attention(key, d_model, cfg, norm_eps, std, out_std)
