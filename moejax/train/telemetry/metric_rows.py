"""Rows of numbers: what a step's metrics, or the sums of a validation, become before anybody reads
them.

  metrics of a step, or sums over batches -> scalars (means over layers, worst layers)
  and layers: name -> [L]

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, R tasks, D held-out
documents.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from moejax.data.held_out_rows import NO_DOCUMENT
from moejax.data.pipeline import Data
from moejax.moe.routing import RouterConfig
from moejax.moe.statistics import add, layer_statistics, over_layers, token_statistics
from moejax.train.telemetry.document_interval import bits_per_byte_interval

BITS_PER_NAT = 1 / math.log(2)
ValidationSums = Mapping[str, object]


class Row(NamedTuple):
  """Scalars by name, and what the scalars are means and worsts of: each MoE layer's, in order."""

  scalars: dict[str, float]
  layers: dict[str, list[float]]


def layer_row(layers: Mapping[str, np.ndarray], prefix: str = '') -> Row:
  """name -> [L] as a row: the mean and NAME_worst as scalars, and lists.

  Lists keep six digits; who needs the bits has the means.
  """
  scalars = {f'{prefix}{name}': float(value) for name, value in over_layers(layers).items()}
  lists = {}
  for name, values in layers.items():
    lists[name] = [float(f'{x:.6g}') for x in values]
  return Row(scalars, lists)


def perplexity(nats: float) -> float:
  """exp of the mean cross entropy: how many tokens were as likely as each other to the model."""
  # Beyond it a float overflows, and Python's exp is an error.
  return math.exp(min(nats, 700.0))


def training_row(metrics: Mapping[str, object], bytes_per_token: float) -> Row:
  """The row of one step, from its metrics as read from the devices.

  `load` is left out: it is a list for every layer.
  """
  scalars = {
    name: float(value) for name, value in metrics.items() if name not in ('load', 'layers')
  }
  nats = scalars['nll']
  scalars['bits_per_byte'] = nats * BITS_PER_NAT / bytes_per_token
  scalars['perplexity'] = perplexity(nats)
  means, layers = layer_row(metrics['layers'])
  return Row(scalars | means, layers)


def loss_row(metrics: Mapping[str, object]) -> dict[str, float]:
  """Only the losses of a step, by the names that they have in `training_row`, too."""
  names = [name for name in metrics if name == 'nll' or name.startswith('lm_loss/')]
  return {name: float(metrics[name]) for name in names}


def add_sums(sums: ValidationSums | None, batch: ValidationSums) -> ValidationSums:
  """A batch of a validation added to the ones before it; None: it is the first.

  In float64, so that counts are exact. Ratios are taken at the end.
  """
  # Float32 counts are exact up to 2^24 only.
  batch = jax.tree.map(lambda a: np.asarray(a, np.float64), batch)
  if sums is None:
    return batch
  total = {name: sums[name] + batch[name] for name in batch if name != 'stats'}
  return total | {'stats': add(sums['stats'], batch['stats'])}


def sum_by_document(nll: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
  """Sums over each document's tokens, [D] f64; a document may lie in several rows and batches.

  Args:
    nll: [B, S] nats.
    documents: [B, S], each token's, see `Data.validation_documents`.
    count: D.
  """
  is_real = documents != NO_DOCUMENT
  return np.bincount(documents[is_real], nll[is_real].astype(np.float64), minlength=count)


def loss_scalars(
  suffix: str, nll: float, seen: float, text_tokens: int, text_bytes: int
) -> dict[str, float]:
  """The losses of a validation: nats a token, and bits a byte of the text.

  Args:
    suffix: of their names, '' or /TASK.
    nll: sum in nats over the tokens seen.
    seen: tokens that were predicted.
    text_tokens, text_bytes: the size of the whole held-out text.
  """
  nats = float(nll) / float(seen) if seen else math.nan
  # By the tokens that a byte of the whole text makes: a validation may have read a part of it.
  return {
    f'eval/lm_loss{suffix}': nats,
    f'eval/perplexity{suffix}': perplexity(nats),
    f'eval/bits_per_byte{suffix}': nats * BITS_PER_NAT * text_tokens / text_bytes,
  }


def interval_scalars(document_nll: np.ndarray, data: Data) -> dict[str, float]:
  """The interval of bits per byte, of all tasks and of each if there are several.

  document_nll: [D] nats.
  """
  num_bytes, groups, tasks = data.documents
  pieces = {'': np.full(len(tasks), True)}
  if len(data.tasks) > 1:
    pieces |= {f'/{task}': tasks == i for i, task in enumerate(data.tasks)}
  scalars = {}
  for suffix, piece in pieces.items():
    interval = bits_per_byte_interval(document_nll[piece], num_bytes[piece], groups[piece])
    scalars[f'eval/bits_per_byte_low{suffix}'] = interval.low
    scalars[f'eval/bits_per_byte_high{suffix}'] = interval.high
  return scalars


def validation_row(
  sums: ValidationSums, router: RouterConfig, data: Data, more: Mapping[str, np.ndarray]
) -> Row:
  """The row of a validation. All names begin with eval/; of several tasks there are NAME/TASK, too.

  Statistics are of the whole held-out text, so that max_vio is the global one. Where the router
  leaves no expert to compare with, there is no row of margins, see `RouterConfig.has_margin`.

  Args:
    sums: over its batches, see `add_sums` and, for `document_nll`, `sum_by_document`.
    more: further name -> [L].
  """
  nll, seen = sums['task_nll'], sums['task_tokens']
  text = data.validation_tokens, data.validation_bytes
  scalars = loss_scalars('', nll.sum(), seen.sum(), *text)
  if len(data.tasks) > 1:
    for task, task_nll, task_seen, size in zip(data.tasks, nll, seen, data.sizes, strict=True):
      text = size.validation_tokens, size.validation_bytes
      scalars |= loss_scalars(f'/{task}', task_nll, task_seen, *text)
  # Of a part of the text, documents would have lost some of their tokens.
  if seen.sum() == data.validation_tokens:
    scalars |= interval_scalars(sums['document_nll'], data)
  statistics = (
    layer_statistics(sums['load'], router.top_k)
    | token_statistics(sums['stats'], router.has_margin)
    | dict(more)
  )
  means, layers = layer_row(statistics, 'eval/')
  return Row(scalars | means, layers)


def progress_text(
  step: int, steps: int, row: Mapping[str, float], seconds_left: float, columns: int
) -> str:
  """The line that a person reads, of at most so many columns; 0: all of it.

  Where it is too long it goes without what is least missed: first words, then balance losses.
  """
  balance = []
  for name, value in sorted(row.items()):
    if name.startswith('balance/'):
      balance.append(f'  {name.removeprefix("balance/")} {value:.3f}')
  noise, left = f' (noise {row["noise_floor"]:.2f})', ' left'
  width = len(str(steps))
  parts = [
    f'step {step:>{width}}/{steps}  loss {row["lm_loss"]:.3f}  bpb {row["bits_per_byte"]:.3f}',
    *balance,
    f'  MaxVio {row["max_vio"]:.2f}',
    noise,
    f'  {row["tokens_per_second"] / 1000:.1f}k tok/s',
    f'  {clock(seconds_left)}',
    left,
  ]
  # In the order in which they go, the least missed first.
  for least_missed in (left, *balance[::-1], noise):
    if columns and len(''.join(parts)) > columns:
      parts.remove(least_missed)
  return ''.join(parts)


def clock(seconds: float) -> str:
  """75 -> '1m15s'."""
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m{seconds:02}s'
