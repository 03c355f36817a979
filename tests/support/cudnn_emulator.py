"""cuDNN's kernel for packed documents, for CPU: JAX's two operations for it, lowered to jnp.

It takes what the kernel is handed, lengths of slots and where they begin in numbers, and knows
nothing else of documents. What the kernel does not write is NaN.

Letters: B rows, S tokens, H heads, J key-value heads, d their width; T = B S tokens of all rows,
M slots of all rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import mlir

from moejax.model.cudnn_attention import private_module


class Places(NamedTuple):
  """Where the tokens of one operand are in the slots."""

  slot: Array  # [T]
  position: Array  # [T], in the slot
  is_in_one: Array  # [T] bool


def places(lengths: Array, begins: Array, shape: tuple[int, ...]) -> Places:
  """Finds the tokens of an operand of [B, S, heads, d], whose slots begin at these numbers."""
  rows, tokens, heads, width = shape
  firsts = begins.ravel()[: lengths.size, None] // (heads * width)
  token = jnp.arange(rows * tokens)
  inside = (token >= firsts) & (token < firsts + lengths.reshape(-1, 1))
  slot = inside.argmax(0)
  return Places(slot, token - firsts[slot, 0], inside.any(0))


def seen(queries: Places, keys: Places, settings: dict[str, object]) -> Array:
  """Says which keys a query sees, [T, T]."""
  ago = queries.position[:, None] - keys.position
  same = queries.slot[:, None] == keys.slot
  near = ago < (settings['sliding_window_length'] or ago.size)
  return same & (ago >= 0) & near & queries.is_in_one[:, None] & keys.is_in_one


def check_settings(settings: dict[str, object]) -> None:
  cudnn = private_module()
  assert settings['mask_type'] == cudnn.MaskType.PADDING_CAUSAL
  assert settings['layout'] == cudnn.AttentionLayout.BTNH.value
  assert settings['variadic_args'] == (False, False) and settings['dropout_rate'] == 0


def flat(a: Array, heads: int) -> Array:
  """[B, S, J, d] -> [T, H, d] f32."""
  return jnp.repeat(a.reshape(-1, *a.shape[2:]), heads // a.shape[2], 1).astype(jnp.float32)


def written(a: Array, where: Places, like: Array) -> Array:
  """[T, H, d] -> [B, S, J, d] of the dtype of `like`, H / J heads summed, NaN in no slot."""
  a = a.reshape(a.shape[0], like.shape[2], -1, a.shape[2]).sum(2)
  return (
    jnp.where(where.is_in_one[:, None, None], a, jnp.nan).reshape(like.shape).astype(like.dtype)
  )


def forward(q: Array, k: Array, v: Array, *arrays: Array, **settings: object) -> list[Array]:
  check_settings(settings)
  _, q_lengths, k_lengths, q_begins, k_begins, *_ = arrays
  heads, length = q.shape[2], q.shape[1]
  queries, keys = places(q_lengths, q_begins, q.shape), places(k_lengths, k_begins, k.shape)
  assert v.shape == k.shape
  scores = settings['scale'] * jnp.einsum('thd,uhd->htu', flat(q, heads), flat(k, heads))
  scores = jnp.where(seen(queries, keys, settings), scores, -jnp.inf)
  log_sums = jax.nn.logsumexp(scores, -1)  # [H, T]
  y = jnp.einsum('htu,uhd->thd', jnp.exp(scores - log_sums[..., None]), flat(v, heads))
  y = written(y, queries, q)
  if not settings['is_training']:
    return [y]
  kept = jnp.full((q_lengths.size, heads, length), jnp.nan)
  slot = jnp.where(queries.is_in_one, queries.slot, q_lengths.size)
  return [y, kept.at[slot, :, queries.position].set(log_sums.T, mode='drop')]


def backward(q: Array, k: Array, v: Array, *arrays: Array, **settings: object) -> list[Array]:
  check_settings(settings)
  _, q_lengths, k_lengths, q_begins, k_begins, _, _, kept, y, dy = arrays
  heads, scale = q.shape[2], settings['scale']
  queries, keys = places(q_lengths, q_begins, q.shape), places(k_lengths, k_begins, k.shape)
  log_sums = kept[queries.slot, :, queries.position].T[..., None]
  scores = scale * jnp.einsum('thd,uhd->htu', flat(q, heads), flat(k, heads))
  probs = jnp.where(seen(queries, keys, settings), jnp.exp(scores - log_sums), 0)
  here = queries.is_in_one[:, None, None]
  y, dy = (jnp.where(here, flat(a, heads), 0) for a in (y, dy))
  dprobs = jnp.einsum('thd,uhd->htu', dy, flat(v, heads)) - (y * dy).sum(-1).T[..., None]
  dscores = scale * probs * dprobs
  return [
    written(jnp.einsum('htu,uhd->thd', dscores, flat(k, heads)), queries, q),
    written(jnp.einsum('htu,thd->uhd', dscores, flat(q, heads)), keys, k),
    written(jnp.einsum('htu,thd->uhd', probs, dy), keys, v),
  ]


def emulate_cudnn() -> None:
  """Lets this process run the two operations on CPU."""
  cudnn = private_module()
  for operation, emulation in (
    (cudnn._dot_product_attention_fwd_p, forward),
    (cudnn._dot_product_attention_bwd_p, backward),
  ):
    lowering = mlir.lower_fun(emulation, multiple_results=True)
    mlir.register_lowering(operation, lowering, platform='cpu')
