"""Softmax attention by cuDNN's kernel for documents that are packed into rows.

  segments -> runs of equal segments -> first tokens and lengths of some of them -> cuDNN

The scores of all tokens never lie in memory, and neither does a mask: the kernel is told documents
and does only the blocks of scores that somebody sees. See `fused_call` for how JAX is asked.

An array is named with the letters of its shape: q_BSHd is [B, S, H, d].

Letters: B batch, S tokens, H heads, J key-value heads, d width of q, k and v; M documents of a row,
in the mean of all rows, that one call takes, N = M + 1.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from moejax.model.device_attention import (
  attend_on_each_device,
  head_shards,
  rows_and_heads_divide,
)
from moejax.model.remat import ATTENTION
from moejax.sharding.logical_axes import row_shards

# Of a row, in the mean, in one call: rows of 4096 tokens then hold documents of 256. The gradient
# needs B M H S float32 numbers of the forward pass: a quarter of a result of heads of 128.
DOCUMENTS = 16
# The name of what runs in few batches, in a compiled program's text: a plan counts no turn of it.
SELDOM = 'more_documents_than_slots'


class Slots(NamedTuple):
  """Some runs of a batch, in order: where cuDNN finds documents. The last slots may be empty."""

  lengths: Array  # [B, M] i32, 0 of an empty slot
  firsts: Array  # [B, N] i32: B M + 1 first tokens and, behind an empty slot, the end; rest unread


def private_module() -> ModuleType:
  """Returns JAX's module for cuDNN: private, and imported here only, by those who use it."""
  from jax._src.cudnn import fused_attention_stablehlo

  return fused_attention_stablehlo


def widest_head() -> int:
  """Returns how wide heads may be for cuDNN on the GPU at hand; 0: there is none that it knows.

  JAX asks the first GPU of this machine; where a program is compiled ahead of time,
  `moejax.plan.topology` answers.
  """
  has_capability = private_module().check_compute_capability
  if has_capability('9.0'):
    return 256
  return 128 if has_capability('8.0') else 0


def padded_width(q_BSHd: Array, v_BSJv: Array) -> int:
  """Returns the one width that q, k and v are filled up to: a multiple of 8."""
  width = max(q_BSHd.shape[-1], v_BSJv.shape[-1])
  return width + -width % 8


def pad_channels(a: Array, width: int) -> Array:
  """Returns [..., width]: channels of zeros add nothing to a product of q and k."""
  return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])


def supports_packed(q_BSHd: Array, k_BSJd: Array, v_BSJv: Array) -> bool:
  """Whether the kernel can do these, which are in half precision and no wider than `widest_head`.

  It wants Hopper or later, an even length, and rows and heads that divide over the mesh; and it
  counts the numbers of q that lie before a document in 32 bits.
  """
  rows, length, heads = q_BSHd.shape[:3]
  numbers = rows * length * heads * padded_width(q_BSHd, v_BSJv)
  return (
    private_module().check_compute_capability('9.0')
    and length % 2 == 0
    and rows_and_heads_divide(q_BSHd, k_BSJd)
    and numbers // (row_shards() * head_shards()) < 2**31
  )


def cudnn_packed(
  q_BSHd: Array,
  k_BSJd: Array,
  v_BSJv: Array,
  segments_BS: Array,
  window: int,
  scale: float,
  sinks: None,
) -> Array:
  """Attends within documents, each device for its own rows and heads. [B, S, H, v].

  `supports_packed` must have said yes. Documents lie in one piece each: equal segments with others
  between them are two documents. A run of padding is a document as well, so that nothing of the
  result or of a gradient stays unwritten.

  Args:
    sinks: None, the kernel knows none; see `moejax.model.attention_cores.Core` for the others.
  """

  def kernel(q: Array, k: Array, v: Array, segments: Array, sinks: None) -> Array:
    return attend_packed(q, k, v, run_numbers(segments), (window, float(scale)))

  # One width for all three: where values begin is counted in channels of k.
  width = padded_width(q_BSHd, v_BSJv)
  q, k, v = (pad_channels(a, width) for a in (q_BSHd, k_BSJd, v_BSJv))
  y = attend_on_each_device(kernel, q, k, v, segments_BS, sinks=sinks)
  return y[..., : v_BSJv.shape[-1]]


def run_numbers(segments_BS: Array) -> Array:
  """Returns 0, 1, .. for the runs of equal segments of all rows, one row after the other. [B, S]"""
  opens_BS = jnp.pad(
    segments_BS[:, 1:] != segments_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True
  )
  numbers = jnp.cumsum(opens_BS.ravel(), dtype=jnp.int32) - 1
  return numbers.reshape(segments_BS.shape)


def document_slots(runs_BS: Array, turn: Array | int) -> Slots:
  """Returns B M runs from number turn B M on.

  Rows share the slots: what one leaves empty another may need.

  Args:
    runs_BS: see `run_numbers`.
    turn: 0, 1, ..
  """
  rows, tokens = runs_BS.shape[0], runs_BS.size
  slots, places = rows * DOCUMENTS, rows * (DOCUMENTS + 1)
  runs = runs_BS.ravel()
  is_first = jnp.diff(runs, prepend=-1) > 0
  place = runs - turn * slots
  # Where a run is not of this turn, or a token not the first of one, the place is beyond all.
  place = jnp.where(is_first & (place >= 0), place, places)
  ends = jnp.full(places, tokens, jnp.int32)
  firsts = ends.at[place].set(jnp.arange(tokens, dtype=jnp.int32), mode='drop')
  lengths = jnp.diff(firsts)[:slots]
  return Slots(lengths.reshape(rows, -1), firsts.reshape(rows, -1))


def fused_call(
  q_BSHd: Array, k_BSJd: Array, slots: Slots, options: tuple[int, float]
) -> tuple[list[Array], dict[str, object]]:
  """Returns what JAX's operations for cuDNN want beside q, k and v: arrays, and settings.

  These operations lie below its function, which only comes as far as one call for all documents,
  takes them by rows, puts them in order by ten small kernels more, and before JAX 0.11.2 counts
  where a document's keys begin in heads of q: silently wrong with fewer key-value heads.

  Args:
    options: window, see `moejax.model.attention_cores.visible`, and scale.
  """
  cudnn = private_module()
  window, scale = options
  firsts_BN = slots.firsts
  nothing = jnp.zeros(0, q_BSHd.dtype)  # in place of a bias, and of two tables of pages
  # cuDNN counts in numbers, and each operand in its own.
  q_begins_BN, k_begins_BN = (firsts_BN * (a.shape[2] * a.shape[3]) for a in (q_BSHd, k_BSJd))
  lengths_BM = slots.lengths
  arrays = [nothing, lengths_BM, lengths_BM, q_begins_BN, k_begins_BN, nothing, nothing]
  settings = {
    'scale': scale,
    'seed': 0,
    'dropout_rate': 0.0,
    'variadic_args': (False, False),  # no bias, and no gradient to one
    'mask_type': cudnn.MaskType.PADDING_CAUSAL,
    'layout': cudnn.AttentionLayout.BTNH.value,
    'sliding_window_length': window or None,
  }
  # JAX 0.12 has a function of scores more.
  if 'score_mod' in inspect.signature(cudnn.dot_product_attention).parameters:
    settings |= {'score_mod_name': None, 'score_mod_jaxpr': None}
  return arrays, settings


def call_forward(
  operands: tuple[Array, ...], slots: Slots, options: tuple[int, float], is_training: bool
) -> list[Array]:
  """Returns y [B, S, H, d] and, in training, log sums of exponentials [B M, H, S] f32.

  Tokens of no slot stay unwritten.

  Args:
    operands: q, k and v.
  """
  arrays, settings = fused_call(*operands[:2], slots, options)
  operation = private_module()._dot_product_attention_fwd_p
  return operation.bind(*operands, *arrays, **settings, is_training=is_training)


def call_backward(
  operands: tuple[Array, ...],
  slots: Slots,
  options: tuple[int, float],
  results: tuple[Array, ...],
) -> list[Array]:
  """Returns the gradients to q, k and v; tokens of no slot stay unwritten.

  Args:
    operands: q, k and v.
    results: the log sums and y of `call_forward`, and the gradient to y.
  """
  arrays, settings = fused_call(*operands[:2], slots, options)
  operation = private_module()._dot_product_attention_bwd_p
  return operation.bind(*operands, *[*arrays, *results], **settings)


def later_turns(
  call: Callable[[Array], list[Array]], arrays: list[Array], runs_BS: Array
) -> tuple[Array, ...]:
  """Returns `arrays`, all [B, S, ..], with the tokens of turn 1, 2, .. as `call(turn)` has them.

  The loop has no turn where rows have DOCUMENTS runs or fewer, in the mean: in most batches. Its
  length has no bound but that of tokens.
  """
  slots = runs_BS.shape[0] * DOCUMENTS
  turns_BS11 = (runs_BS // slots)[:, :, None, None]

  def body(turn: Array, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    # A selection and no sum: what a call does not write may be anything.
    return tuple(
      jnp.where(turns_BS11 == turn, new, old) for new, old in zip(call(turn), arrays, strict=True)
    )

  with jax.named_scope(SELDOM):
    return jax.lax.fori_loop(1, runs_BS[-1, -1] // slots + 1, body, tuple(arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_packed(
  q_BSHd: Array, k_BSJd: Array, v_BSJd: Array, runs_BS: Array, options: tuple[int, float]
) -> Array:
  """Attends within the runs of one device, however many there are. [B, S, H, d].

  Args:
    runs_BS: see `run_numbers`.
    options: see `fused_call`.
  """

  def call(turn: Array | int) -> list[Array]:
    slots = document_slots(runs_BS, turn)
    return call_forward((q_BSHd, k_BSJd, v_BSJd), slots, options, is_training=False)

  (y_BSHd,) = later_turns(call, call(0), runs_BS)
  return y_BSHd


def attend_packed_forward(
  q_BSHd: Array, k_BSJd: Array, v_BSJd: Array, runs_BS: Array, options: tuple[int, float]
) -> tuple[Array, tuple]:
  """Returns the result, and what the gradient needs."""
  operands = q_BSHd, k_BSJd, v_BSJd
  y_BSHd, log_sums = call_forward(operands, document_slots(runs_BS, 0), options, is_training=True)

  def call(turn: Array) -> list[Array]:
    return call_forward(operands, document_slots(runs_BS, turn), options, is_training=False)

  (y_BSHd,) = later_turns(call, [y_BSHd], runs_BS)
  # As of all kernels, named where the gradient takes it from: see remat.py.
  log_sums, y_BSHd = checkpoint_name((log_sums, y_BSHd), ATTENTION)
  return y_BSHd, (operands, runs_BS, log_sums, y_BSHd)


def attend_packed_backward(
  options: tuple[int, float], saved: tuple, dy_BSHd: Array
) -> tuple[Array | None, ...]:
  """Returns the gradients to q, k and v."""
  operands, runs_BS, log_sums, y_BSHd = saved
  slots = document_slots(runs_BS, 0)
  gradients = call_backward(operands, slots, options, (log_sums, y_BSHd, dy_BSHd))

  def call(turn: Array) -> list[Array]:
    # Later turns are few: their forward call is done again, and nothing of it is kept.
    slots = document_slots(runs_BS, turn)
    _, log_sums = call_forward(operands, slots, options, is_training=True)
    return call_backward(operands, slots, options, (log_sums, y_BSHd, dy_BSHd))

  return (*later_turns(call, gradients, runs_BS), None)


attend_packed.defvjp(attend_packed_forward, attend_packed_backward)
