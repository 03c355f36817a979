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
import jax.numpy as jnp
from jax import Array

from moejax.config import check, frozendict
from moejax.config.schedule import schedule_problem

Tree = TypeVar('Tree')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What the language-model loss is made of. Coefficients are numbers or schedules ('1e-4, 0@50%'); 0: off.

  z_coef: of the squared logsumexp of the logits (PaLM uses 1e-4).  mtp_coef: lambda of multi-token prediction.
  task_weights: task of a mixture -> weight of its tokens, 1 where not named.  chunks: cut the sequence, for memory.
  """

  z_coef: str = '0'
  mtp_coef: str = '0.3'
  task_weights: frozendict = frozendict()
  chunks: int = 4

  def __post_init__(self) -> None:
    check(
      *(schedule_problem(name, getattr(self, name)) for name in ('z_coef', 'mtp_coef')),
      *(
        f'task_weights.{task}={weight}: use a number of 0 or more'
        for task, weight in self.task_weights.items()
        if not 0 <= weight < float('inf')
      ),
      f'chunks={self.chunks}: use 1 or more' if self.chunks < 1 else '',
    )


class PerToken(NamedTuple):
  """What the loss is made of, before weights; for the log, without gradient."""

  nll: Array  # [B, S] f32  negative log likelihood of the target, nats
  log_z: Array  # [B, S] f32  logsumexp of the logits


def chunk_loss(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array
) -> tuple[Array, PerToken]:
  """`sum weight * (nll + z_coef * log_z^2)` of one chunk. h [B, s, D], head [D, V], targets and weights [B, s]."""
  # A flat list of tokens: see layers.matmul, of which this is the float32-out form.
  logits = jnp.einsum(
    'td,dv->tv',
    h.reshape(-1, h.shape[-1]),
    head.astype(h.dtype),
    preferred_element_type=jnp.float32,
  ).reshape(*h.shape[:-1], -1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A comparison instead of a gather: its transpose is a `where`, not a scatter into [B, s, V].
  nll = log_z - jnp.where(jnp.arange(head.shape[1]) == targets[..., None], logits, 0.0).sum(-1)
  return (weights * (nll + z_coef * jnp.square(log_z))).sum(), PerToken(nll, log_z)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def cross_entropy(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array, chunks: int
) -> tuple[Array, PerToken]:
  """`sum weight * (nll + z_coef * log_z^2)` over all tokens, and its parts, which carry no gradient.

  Differentiated, it makes the gradient of each chunk along with the loss, so that logits are made once and dropped.

  Args:
    h: [B, S, D] in the compute dtype, after the final norm.
    head: [D, V] f32, cast to the dtype of h for the product; logits and all after them are float32.
    targets: [B, S] i32. Where nothing is to be predicted (-100) the weight must be 0.
    weights: [B, S] f32, no gradient, nor has z_coef. Divide by the tokens of the whole batch, and micro-batches add up.
  """

  def chunk(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, PerToken]:
    loss, parts = chunk_loss(xs[0], head, *xs[1:], z_coef)
    return total + loss, parts

  total, parts = jax.lax.scan(chunk, jnp.zeros(()), split_chunks((h, targets, weights), chunks))
  return total, join_chunks(parts)


def cross_entropy_fwd(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array, chunks: int
) -> tuple[tuple[Array, PerToken], tuple[Array, Array]]:
  """The loss with its gradient already in hand: dh [B, S, D] and dhead [D, V] for a cotangent of 1."""
  gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)

  def chunk(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple, tuple]:
    total, d_head = carry
    (loss, parts), (dh, d_head_chunk) = gradient(xs[0], head, *xs[1:], z_coef)
    return (total + loss, d_head + d_head_chunk), (parts, dh)

  (total, d_head), (parts, dh) = jax.lax.scan(
    chunk, (jnp.zeros(()), jnp.zeros_like(head)), split_chunks((h, targets, weights), chunks)
  )
  return (total, join_chunks(parts)), (join_chunks(dh), d_head)


def cross_entropy_bwd(
  chunks: int, residuals: tuple[Array, Array], cotangent: tuple[Array, PerToken]
) -> tuple[Array, Array, None, None, None]:
  """Scales the gradient by the cotangent of the total; the parts have none."""
  del chunks
  (dh, d_head), scale = residuals, cotangent[0]
  return dh * scale.astype(dh.dtype), d_head * scale, None, None, None


cross_entropy.defvjp(cross_entropy_fwd, cross_entropy_bwd)


def split_chunks(tree: Tree, chunks: int) -> Tree:
  """[B, S, ...] -> [chunks, B, S / chunks, ...]; where they do not divide S, with the next number that does."""
  length = jax.tree.leaves(tree)[0].shape[1]
  chunks = next(n for n in range(min(chunks, length), length + 1) if length % n == 0)
  return jax.tree.map(
    lambda a: jnp.moveaxis(a.reshape(a.shape[0], chunks, -1, *a.shape[2:]), 1, 0), tree
  )


def join_chunks(tree: Tree) -> Tree:
  """The inverse of `split`."""
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), tree)
