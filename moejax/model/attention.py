"""Causal self-attention, grouped-query or latent, and the cache that decoding keeps.

  x -> q, k, v -> norm, clip -> rope -> attend -> output projection

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S tokens, T places of a cache, D model, H heads, J key-value heads, d head width;
of latent attention R rank, n and r channels of a head without and with position, v of a value.
Where two parts lie beside each other in one dimension, its letter is c (channels): n + r of a head,
R + r of a cached latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moejax.model.attention_cores import attend, attend_by
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
      all_heads = cfg.qk_norm == 'projection'
      # The key decides nothing: a norm starts at 1.
      self.q_norm = RMSNorm(key, width if all_heads else cfg.d_head, norm_eps)
      self.k_norm = RMSNorm(key, kv_width if all_heads else cfg.d_head, norm_eps)
    if cfg.sinks:
      self.sinks = param(key, (cfg.num_heads,), ('norm',), constant_init(0.0))

  def heads(self, x_BSD: Array, positions_BS: Array) -> tuple[Array, Array, Array]:
    """Returns q [B, S, H, d] and k [B, S, J, d], both rotated, and v [B, S, J, d]."""
    cfg = self.cfg
    q, k, v = self.q(x_BSD), self.k(x_BSD), self.v(x_BSD)
    # A norm of the projection has a scale for each channel of each head, and goes before the split;
    # a norm of heads has one scale for all of them, and goes after it.
    if cfg.qk_norm == 'projection':
      q, k = self.q_norm(q), self.k_norm(k)
    q_BSHd, k_BSJd, v_BSJd = (a.reshape(*a.shape[:2], -1, cfg.d_head) for a in (q, k, v))
    if cfg.qk_norm == 'head':
      q_BSHd, k_BSJd = self.q_norm(q_BSHd), self.k_norm(k_BSJd)
    if cfg.clip_qkv:
      limit = cfg.clip_qkv
      q_BSHd, k_BSJd, v_BSJd = (jnp.clip(a, -limit, limit) for a in (q_BSHd, k_BSJd, v_BSJd))
    q_BSHd = rotate(q_BSHd, positions_BS, cfg.rope)
    k_BSJd = rotate(k_BSJd, positions_BS, cfg.rope)
    return q_BSHd, k_BSJd, v_BSJd

  def __call__(
    self,
    x_BSD: Array,
    segments_BS: Array,
    positions_BS: Array,
    window: int = 0,
    cache: KVCache | None = None,
  ) -> tuple[Array, KVCache | None]:
    """Attends within the tokens at hand, or from a cache on.

    Args:
      x_BSD: the residual after its norm.
      segments_BS: i32, the document of each token, 0 for padding.
      positions_BS: i32, of each token in its document.
      window: a token sees itself and window - 1 before it; 0: everything before it.
      cache: of tokens before these; None: there are none.

    Returns:
      y [B, S, D], and the cache with these tokens in it.
    """
    cfg = self.cfg
    scale = cfg.d_head**-0.5 * softmax_factor(cfg.rope)
    sinks_H = self.sinks[...] if cfg.sinks else None
    q_BSHd, k_BSJd, v_BSJd = self.heads(x_BSD, positions_BS)
    if cache is None:
      y_BSHd = attend_at_once(
        cfg, q_BSHd, k_BSJd, v_BSJd, segments_BS, window=window, scale=scale, sinks=sinks_H
      )
    else:
      cache, (k_BTJd, v_BTJd), mask = append(cache, (k_BSJd, v_BSJd), segments_BS, window)
      y_BSHd = attend(q_BSHd, k_BTJd, v_BTJd, mask, scale=scale, sinks=sinks_H)
    return self.out(y_BSHd.reshape(*x_BSD.shape[:2], -1)), cache


class LatentAttention(nnx.Module):
  """Multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1).

  The equations are also in DeepSeek-V3, 2412.19437, section 2.1.1. There are two forms
  of them here. Without a cache, keys and values are made from the latent: fewer multiplications.
  With one, the latents are attended to as they are, as one key-value head of R + r channels: the
  projection that would make keys of them is multiplied into the queries, and the one that would
  make values, into the result.
  """

  def __init__(
    self, key: Array, d_model: int, cfg: AttentionConfig, std: float, out_std: float
  ) -> None:
    keys, latent, heads = jax.random.split(key, 5), cfg.latent, cfg.num_heads
    self.cfg = cfg
    q_width, kv_width = heads * (cfg.d_head + latent.d_rope), heads * (cfg.d_head + latent.d_value)
    # Ranks are split as `embed` is where heads are made of them: these are a model's largest
    # matrices but the experts.
    if latent.q_rank:
      self.q_a = Linear(keys[0], (d_model, latent.q_rank), ('embed', ''), std, cfg.qkv_bias)
      self.q_a_norm = RMSNorm(key, latent.q_rank, latent.norm_eps)
      self.q_b = Linear(keys[1], (latent.q_rank, q_width), ('embed', 'heads'), std)
    else:
      self.q = Linear(keys[1], (d_model, q_width), ('embed', 'heads'), std)
    # One matrix makes the latent and, beside it, the rotated channels that all heads share.
    kv_a_width = latent.kv_rank + latent.d_rope
    self.kv_a = Linear(keys[2], (d_model, kv_a_width), ('embed', ''), std, cfg.qkv_bias)
    self.kv_a_norm = RMSNorm(key, latent.kv_rank, latent.norm_eps)
    self.kv_b = Linear(keys[3], (latent.kv_rank, kv_width), ('embed', 'heads'), std)
    out_shape = (heads * latent.d_value, d_model)
    self.out = Linear(keys[4], out_shape, ('heads', 'embed'), out_std, cfg.out_bias)

  def __call__(
    self,
    x_BSD: Array,
    segments_BS: Array,
    positions_BS: Array,
    window: int = 0,
    cache: KVCache | None = None,
  ) -> tuple[Array, KVCache | None]:
    """Takes and returns what `Attention` does: x -> y, both [B, S, D], and the cache."""
    cfg, latent = self.cfg, self.cfg.latent
    B, S, _ = x_BSD.shape
    # The scale is of all channels of a key, those with position among them.
    scale = (cfg.d_head + latent.d_rope) ** -0.5 * softmax_factor(cfg.rope)
    if latent.q_rank:
      q = self.q_b(self.q_a_norm(self.q_a(x_BSD)))
    else:
      q = self.q(x_BSD)
    q_BSHc = q.reshape(B, S, cfg.num_heads, -1)
    q_BSHn, q_BSHr = jnp.split(q_BSHc, [cfg.d_head], axis=-1)
    latent_BSR, k_BSr = jnp.split(self.kv_a(x_BSD), [latent.kv_rank], axis=-1)
    latent_BSR = self.kv_a_norm(latent_BSR)
    k_BS1r = k_BSr[:, :, None]  # one key for all heads
    q_BSHr = rotate(q_BSHr, positions_BS, cfg.rope)
    k_BS1r = rotate(k_BS1r, positions_BS, cfg.rope)
    if cache is None:
      k_BSHc, v_BSHv = self.keys_and_values(latent_BSR, k_BS1r)
      q_BSHc = jnp.concatenate([q_BSHn, q_BSHr], -1)
      y_BSHv = attend_at_once(
        cfg, q_BSHc, k_BSHc, v_BSHv, segments_BS, window=window, scale=scale, sinks=None
      )
    else:
      to_keys_RHn, to_values_RHv = self.key_and_value_projections(x_BSD.dtype)
      q_BSHR = jnp.einsum('bshn,rhn->bshr', q_BSHn, to_keys_RHn)
      q_BSHc = jnp.concatenate([q_BSHR, q_BSHr], -1)
      entry_BS1c = jnp.concatenate([latent_BSR[:, :, None], k_BS1r], -1)
      cache, (entry_BT1c,), mask = append(cache, (entry_BS1c,), segments_BS, window)
      y_BSHc = attend(q_BSHc, entry_BT1c, entry_BT1c, mask, scale=scale, sinks=None)
      # The result's last r channels are the sum of keys, and dropped: cheaper than a copy of the
      # cache without them.
      y_BSHR = y_BSHc[..., : latent.kv_rank]
      y_BSHv = jnp.einsum('bshr,rhv->bshv', y_BSHR, to_values_RHv)
    return self.out(y_BSHv.reshape(B, S, -1)), cache

  def keys_and_values(self, latent_BSR: Array, k_BS1r: Array) -> tuple[Array, Array]:
    """Makes every head's keys [B, S, H, n + r] and values [B, S, H, v].

    Args:
      latent_BSR: the normed latents.
      k_BS1r: the one rotated key that all heads share.
    """
    kv_BSHc = self.kv_b(latent_BSR).reshape(*latent_BSR.shape[:2], self.cfg.num_heads, -1)
    k_BSHn, v_BSHv = jnp.split(kv_BSHc, [self.cfg.d_head], axis=-1)
    k_BSHr = jnp.broadcast_to(k_BS1r, (*k_BSHn.shape[:-1], k_BS1r.shape[-1]))
    return jnp.concatenate([k_BSHn, k_BSHr], -1), v_BSHv

  def key_and_value_projections(self, dtype: jnp.dtype) -> list[Array]:
    """Returns what makes keys of a latent [R, H, n], and what makes values [R, H, v]."""
    w = self.kv_b.w[...].astype(dtype)
    w_RHc = w.reshape(w.shape[0], self.cfg.num_heads, -1)
    return jnp.split(w_RHc, [self.cfg.d_head], axis=-1)


def attend_at_once(
  cfg: AttentionConfig,
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  *,
  window: int,
  scale: float,
  sinks: Array | None,
) -> Array:
  """Attends within the tokens at hand by the implementation of the config. [B, S, H, v]."""
  # Heads are laid out before the core, so that a kernel is called on each device's own heads.
  q_BSHd, k_BSJd, v_BSJv = (
    constrain(a, 'batch', 'sequence', 'heads', '') for a in (q_BSHd, k_BSJd, v_BSJv)
  )
  return attend_by(
    cfg.implementation,
    q_BSHd,
    k_BSJd,
    v_BSJv,
    segments_BS,
    window=window,
    scale=scale,
    sinks=sinks,
  )


def make_attention(
  key: Array, d_model: int, cfg: AttentionConfig, norm_eps: float, std: float, out_std: float
) -> Attention | LatentAttention:
  """Makes the kind of attention that a config asks for.

  Args:
    norm_eps: epsilon of qk_norm; latent attention has its own in the config.
    std, out_std: standard deviations of initial matrices, out_std of the projection that writes to
      the residual.
  """
  if cfg.latent.kv_rank:
    return LatentAttention(key, d_model, cfg, std, out_std)
  return Attention(key, d_model, cfg, norm_eps, std=std, out_std=out_std)
