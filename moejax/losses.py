"""The language-model loss: cross entropy without ever holding the logits of all tokens.

  hidden [B, S, D] -> for each chunk of the sequence: logits, loss, and at once their gradient -> sums

Chunks are cut from the sequence: a chunk's logits [B, S / chunks, V] then know their own logsumexp. Chunks of the
vocabulary would have to make the same logits a second time once all of it is known: a third more work (LOG.md).

Letters: B batch, S sequence, D model, V vocab.
"""

import dataclasses
import functools
from typing import NamedTuple, TypeVar

import jax
from jax import Array
import jax.numpy as jnp

from moejax.config import check

Tree = TypeVar('Tree')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """`z_coef` weighs the squared logsumexp of the logits (PaLM 2022 uses 1e-4; 0: off); `chunks` cut the sequence."""

  z_coef: float = 0.0
  chunks: int = 4

  def __post_init__(self) -> None:
    check(
      f'z_coef={self.z_coef}: use 0 (off) or more' if self.z_coef < 0 else '',
      f'chunks={self.chunks}: use 1 or more' if self.chunks < 1 else '',
    )


class PerToken(NamedTuple):
  """What the loss is made of, before weights; for the log, without gradient."""

  nll: Array     # [B, S] f32  negative log likelihood of the target, nats
  log_z: Array   # [B, S] f32  logsumexp of the logits


def chunk_loss(h: Array, head: Array, targets: Array, weights: Array, z_coef: float) -> tuple[Array, PerToken]:
  """`sum weight * (nll + z_coef * log_z^2)` of one chunk. h [B, s, D], head [D, V], targets and weights [B, s]."""
  # A flat list of tokens: see layers.matmul, of which this is the float32-out form.
  logits = jnp.einsum('td,dv->tv', h.reshape(-1, h.shape[-1]), head.astype(h.dtype),
                      preferred_element_type=jnp.float32).reshape(*h.shape[:-1], -1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A comparison instead of a gather: its transpose is a `where`, not a scatter into [B, s, V].
  label = jnp.where(jnp.arange(head.shape[1]) == targets[..., None], logits, 0.0).sum(-1)
  nll = log_z - label
  return (weights * (nll + z_coef * jnp.square(log_z))).sum(), PerToken(nll, log_z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h: Array, head: Array, targets: Array, weights: Array, cfg: LossConfig) -> tuple[Array, PerToken]:
  """`sum weight * (nll + z_coef * log_z^2)` over all tokens, and its parts.

  Differentiated, it makes the gradient of each chunk along with the loss, so that logits are made once and dropped.

  Args:
    h: [B, S, D] in the compute dtype, after the final norm.
    head: [D, V] f32, cast to the dtype of h for the product; logits and all after them are float32.
    targets: [B, S] i32. Where nothing is to be predicted (-100) the weight must be 0.
    weights: [B, S] f32, no gradient. Divide by the tokens of the whole batch, and micro-batches add up.

  Returns:
    The scalar to differentiate, and the PerToken, which carries no gradient.
  """
  def chunk(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, PerToken]:
    loss, parts = chunk_loss(xs[0], head, *xs[1:], cfg.z_coef)
    return total + loss, parts

  total, parts = jax.lax.scan(chunk, jnp.zeros(()), split((h, targets, weights), cfg.chunks))
  return total, join(parts)


def cross_entropy_fwd(h: Array, head: Array, targets: Array, weights: Array, cfg: LossConfig
                      ) -> tuple[tuple[Array, PerToken], tuple[Array, Array]]:
  """The loss with its gradient already in hand: dh [B, S, D] and dhead [D, V] for a cotangent of 1."""
  gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

  def chunk(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple, tuple]:
    total, d_head = carry
    (loss, parts), (dh, d_head_chunk) = gradient(xs[0], head, *xs[1:], cfg.z_coef)
    return (total + loss, d_head + d_head_chunk), (parts, dh)

  (total, d_head), (parts, dh) = jax.lax.scan(
    chunk, (jnp.zeros(()), jnp.zeros_like(head)), split((h, targets, weights), cfg.chunks))
  return (total, join(parts)), (join(dh), d_head)


def cross_entropy_bwd(cfg: LossConfig, residuals: tuple[Array, Array], cotangent: tuple[Array, PerToken]
                      ) -> tuple[Array, Array, None, None]:
  """Scales the gradient by the cotangent of the total; the parts have none."""
  del cfg
  scale = cotangent[0]
  dh, d_head = residuals
  return dh * scale.astype(dh.dtype), d_head * scale, None, None


cross_entropy.defvjp(cross_entropy_fwd, cross_entropy_bwd)


def split(tree: Tree, chunks: int) -> Tree:
  """[B, S, ...] -> [chunks, B, S / chunks, ...]; where they do not divide S, with the next number that does."""
  length = jax.tree.leaves(tree)[0].shape[1]
  chunks = next(n for n in range(min(chunks, length), length + 1) if length % n == 0)
  return jax.tree.map(
    lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0), tree)


def join(tree: Tree) -> Tree:
  """The inverse of `split`."""
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), tree)
