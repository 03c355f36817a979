"""Rows of numbers: what a step's metrics, or the sums of a validation, become before anybody reads them.

  metrics of a step, or sums over batches -> scalars (means over layers, worst layers) and layers: name -> [L]

Letters: B batch, S sequence, E experts, K experts per token, L MoE layers, R tasks.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

from moejax.data.pipeline import Data
from moejax.moe.statistics import add, layer_statistics, over_layers, token_statistics

BITS_PER_NAT = 1 / math.log(2)
ValidationSums = Mapping[str, object]


class Row(NamedTuple):
  """Scalars by name, and of each MoE layer, first to last, what the scalars are means and worsts of."""

  scalars: dict[str, float]
  layers: dict[str, list[float]]


def of_layers(layers: Mapping[str, np.ndarray], prefix: str = '') -> Row:
  """name -> [L] as means, NAME_worst and lists. Lists keep six digits; who needs the bits has the means."""
  scalars = {f'{prefix}{name}': float(value) for name, value in over_layers(layers).items()}
  return Row(
    scalars, {name: [float(f'{x:.6g}') for x in values] for name, values in layers.items()}
  )


def perplexity(nats: float) -> float:
  """exp of the mean cross entropy: how many tokens were as likely as each other to the model."""
  return math.exp(min(nats, 700.0))


def training_row(metrics: Mapping[str, object], bytes_per_token: float) -> Row:
  """Of one step's metrics, read from the devices. `load` is left out: it is a list for every layer."""
  scalars = {
    name: float(value) for name, value in metrics.items() if name not in ('load', 'layers')
  }
  nats = scalars['nll']
  scalars |= {
    'bits_per_byte': nats * BITS_PER_NAT / bytes_per_token,
    'perplexity': perplexity(nats),
  }
  means, layers = of_layers(metrics['layers'])
  return Row(scalars | means, layers)


def add_sums(sums: ValidationSums | None, batch: ValidationSums) -> ValidationSums:
  """A batch of a validation added to the ones before it, in float64: counts are exact. Ratios are taken at the end."""
  batch = jax.tree.map(lambda a: np.asarray(a, np.float64), batch)
  if sums is None:
    return batch
  return {
    name: add(sums[name], batch[name]) if name == 'stats' else sums[name] + batch[name]
    for name in batch
  }


def validation_row(
  sums: ValidationSums, top_k: int, data: Data, more: Mapping[str, np.ndarray]
) -> Row:
  """Of batches `added`. All names begin with eval/; of several tasks there are NAME/TASK, too.

  Statistics are of the whole held-out text, so that max_vio is the global one. more: further name -> [L].
  """
  losses = {
    '': (
      sums['task_nll'].sum(),
      sums['task_tokens'].sum(),
      data.validation_tokens,
      data.validation_bytes,
    )
  }
  if len(data.tasks) > 1:
    losses |= {
      f'/{task}': (nll, tokens, size.validation_tokens, size.validation_bytes)
      for task, nll, tokens, size in zip(
        data.tasks, sums['task_nll'], sums['task_tokens'], data.sizes, strict=True
      )
    }
  scalars = {}
  for task, (nll, seen, tokens, size) in losses.items():
    nats = float(nll) / float(seen) if seen else math.nan
    scalars |= {
      f'eval/lm_loss{task}': nats,
      f'eval/perplexity{task}': perplexity(nats),
      f'eval/bits_per_byte{task}': nats * BITS_PER_NAT * tokens / size,
    }
  layers = layer_statistics(sums['load'], top_k) | token_statistics(sums['stats']) | dict(more)
  means, layers = of_layers(layers, 'eval/')
  return Row(scalars | means, layers)


def progress_text(
  step: int, steps: int, row: Mapping[str, float], seconds_left: float, columns: int
) -> str:
  """The line that a person reads, without what is least missed where it is longer than `columns`; 0: all of it."""
  balance = [
    f'  {name.removeprefix("balance/")} {value:.3f}'
    for name, value in sorted(row.items())
    if name.startswith('balance/')
  ]
  noise, left = f' (noise {row["noise_floor"]:.2f})', ' left'
  parts = [
    f'step {step:>{len(str(steps))}}/{steps}  loss {row["lm_loss"]:.3f}  bpb {row["bits_per_byte"]:.3f}',
    *balance,
    f'  MaxVio {row["max_vio"]:.2f}',
    noise,
    f'  {row["tokens_per_second"] / 1000:.1f}k tok/s',
    f'  {clock(seconds_left)}',
    left,
  ]
  for missed in (left, *balance[::-1], noise):
    if columns and len(''.join(parts)) > columns:
      parts.remove(missed)
  return ''.join(parts)


def clock(seconds: float) -> str:
  """75 -> '1m15s'."""
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}h{minutes % 60:02}m' if minutes >= 60 else f'{minutes}m{seconds:02}s'
