"""The language-model loss: cross entropy without ever holding the logits of all tokens.

  hidden [B, S, D] -> of each chunk of the sequence: logits, loss and at once their gradient -> sums

Chunks are cut from the sequence: a chunk's logits [B, S / chunks, V] then know their own logsumexp.
Chunks of the vocabulary would have to make the same logits a second time once all of it is known: a
third more work (LOG.md).

Letters: B batch, S sequence, D model, V vocab.
"""

import dataclasses
import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from moejax.config import at_least, check, frozendict, not_finite
from moejax.config.checks import LARGEST
from moejax.config.schedule import schedule_problem
from moejax.sharding.logical_axes import constrain, row_shards, sum_row_shards

Tree = TypeVar('Tree')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """What the language-model loss is made of.

  z_coef, mtp_coef: coefficients of the squared logsumexp of the logits (PaLM uses 1e-4), and of
    multi-token prediction (its lambda). Each is a number or a schedule ('1e-4, 0@50%'); 0: off.
  task_weights: task of a mixture -> weight of its tokens, 1 where not named.
  chunks: pieces of the sequence whose logits are made one after another, for memory; of any length
    of sequence, the last piece is filled up.
  """

  z_coef: str = '0'
  mtp_coef: str = '0.3'
  task_weights: frozendict = frozendict()
  chunks: int = 4

  def __post_init__(self) -> None:
    check(
      schedule_problem('z_coef', self.z_coef),
      schedule_problem('mtp_coef', self.mtp_coef),
      *(
        f'task_weights.{task}={weight!r}: use a number of 0 or more'
        for task, weight in self.task_weights.items()
        if isinstance(weight, str) or -LARGEST <= weight < 0
      ),
      *not_finite(self),
      *at_least(1, self, 'chunks'),
    )


class PerToken(NamedTuple):
  """What the loss is made of, before weights; only for logging, since no gradient flows through."""

  nll: Array  # [B, S] f32  negative log likelihood of the target, nats
  log_z: Array  # [B, S] f32  logsumexp of the logits


def chunk_loss(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array
) -> tuple[Array, PerToken]:
  """Computes `sum weight * (nll + z_coef * log_z^2)` of one chunk of s tokens a row.

  Args:
    h: [B, s, D].
    head: [D, V] or [n, D, V], see `head_by_rows`.
    targets, weights: [B, s].
  """
  # A flat list of tokens: see moe.experts.ffn.matmul, of which this is the float32-out form.
  tokens = h.reshape(*head.shape[:-2], -1, h.shape[-1])
  flat_logits = jnp.einsum('...td,...dv->...tv', tokens, head, preferred_element_type=jnp.float32)
  logits = flat_logits.reshape(*h.shape[:-1], -1)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # A comparison instead of a gather: its transpose is a `where`, not a scatter into [B, s, V].
  is_target = jnp.arange(head.shape[-1]) == targets[..., None]
  nll = log_z - jnp.where(is_target, logits, 0.0).sum(-1)
  return (weights * (nll + z_coef * jnp.square(log_z))).sum(), PerToken(nll, log_z)


def head_by_rows(h: Array, head: Array) -> Array:
  """Returns the head in the dtype of h, [n, D, V]: one for each of the n parts that rows lie in.

  So each device gathers the head once, and not for every chunk; and the gradient of what it was
  given is its own sum over chunks, to be added to those of others once. [D, V] where rows lie in
  one part: XLA for CPUs makes the gradient of [1, D, V] by a product and a transpose.
  """
  parts, head = row_shards(), head.astype(h.dtype)
  if parts == 1 or h.shape[0] % parts:
    return head
  return constrain(jnp.broadcast_to(head, (parts, *head.shape)), 'batch', '', 'vocab')


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def cross_entropy(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array, chunks: int
) -> tuple[Array, PerToken]:
  """Computes `sum weight * (nll + z_coef * log_z^2)` over all tokens, and its parts.

  Differentiated, it makes the gradient of each chunk along with the loss, so that logits are made
  once and dropped. The parts carry no gradient.

  Args:
    h: [B, S, D] in the compute dtype, after the final norm.
    head: [D, V] f32, cast to the dtype of h for the product; logits and all after them are float32.
    targets: [B, S] i32. Where nothing is to be predicted (-100) the weight must be 0.
    weights: [B, S] f32. Divide by the tokens of the whole batch, and micro-batches add up.
    z_coef: of log_z^2. Neither it nor the weights are differentiated.
    chunks: how many pieces the sequence is cut into, see `split_chunks`.
  """

  by_rows = head_by_rows(h, head)

  def chunk(total: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, PerToken]:
    loss, parts = chunk_loss(xs[0], by_rows, *xs[1:], z_coef)
    return total + loss, parts

  total, parts = jax.lax.scan(chunk, jnp.zeros(()), split_chunks((h, targets, weights), chunks))
  return total, join_chunks(parts, h.shape[1])


def cross_entropy_fwd(
  h: Array, head: Array, targets: Array, weights: Array, z_coef: Array, chunks: int
) -> tuple[tuple[Array, PerToken], tuple[Array, Array]]:
  """Computes the loss, and as residuals its gradient: dh [B, S, D] and dhead [D, V].

  They are for a cotangent of 1; `cross_entropy_bwd` scales them.
  """
  gradient = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)
  by_rows = head_by_rows(h, head)

  def chunk(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple, tuple]:
    total, d_head = carry
    (loss, parts), (dh, d_head_chunk) = gradient(xs[0], by_rows, *xs[1:], z_coef)
    return (total + loss, d_head + d_head_chunk.astype(d_head.dtype)), (parts, dh)

  # The head's gradient is summed over chunks in place, in float32 as the head is; that of h is
  # each chunk's own.
  is_in_parts = by_rows.ndim > head.ndim
  no_gradient = jnp.zeros_like(by_rows, dtype=head.dtype)
  if is_in_parts:
    no_gradient = constrain(no_gradient, 'batch', '', 'vocab')
  pieces = split_chunks((h, targets, weights), chunks)
  (total, d_head), (parts, dh) = jax.lax.scan(chunk, (jnp.zeros(()), no_gradient), pieces)
  if is_in_parts:
    d_head = sum_row_shards(d_head, 'embed', 'vocab')
  length = h.shape[1]
  return (total, join_chunks(parts, length)), (join_chunks(dh, length), d_head)


def cross_entropy_bwd(
  chunks: int, residuals: tuple[Array, Array], cotangent: tuple[Array, PerToken]
) -> tuple[Array, Array, None, None, None]:
  """Scales the gradient by the cotangent of the total; that of the parts is dropped."""
  del chunks
  (dh, d_head), scale = residuals, cotangent[0]
  return dh * scale.astype(dh.dtype), d_head * scale, None, None, None


cross_entropy.defvjp(cross_entropy_fwd, cross_entropy_bwd)


def split_chunks(tree: Tree, chunks: int) -> Tree:
  """Cuts [B, S, ...] into [n, B, s, ...], n at most `chunks`, of s = ceil(S / chunks) tokens each.

  What the last piece lacks are zeros: tokens of weight 0, which add nothing to a loss, and no
  gradient. Not the next number that divides S: that is S itself where S is prime.
  """
  length = jax.tree.leaves(tree)[0].shape[1]
  size = -(-length // chunks)
  number = -(-length // size)  # fewer than asked where some would be empty

  def split(a: Array) -> Array:
    rest = a.ndim - 2
    padded = jnp.pad(a, ((0, 0), (0, number * size - length), *[(0, 0)] * rest))
    return jnp.moveaxis(padded.reshape(a.shape[0], number, size, *a.shape[2:]), 1, 0)

  return jax.tree.map(split, tree)


def join_chunks(tree: Tree, length: int) -> Tree:
  """Joins [n, B, s, ...] to [B, S, ...], S = `length`: the inverse of `split_chunks`."""

  def join(a: Array) -> Array:
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])[:, :length]

  return jax.tree.map(join, tree)
