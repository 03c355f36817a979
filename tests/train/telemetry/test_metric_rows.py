"""Rows: what is logged is what was measured, of all batches and each task; the progress line
fits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from moejax.data.held_out_rows import HeldOutDocuments
from moejax.data.pipeline import Size
from moejax.moe.routing import RouterConfig
from moejax.moe.statistics import STATISTICS, Stats, layer_statistics, token_statistics
from moejax.train.telemetry.metric_rows import (
  add_sums,
  clock,
  perplexity,
  progress_text,
  sum_by_document,
  training_row,
  validation_row,
)

L, E, K = 3, 4, 2
ROUTER = RouterConfig(E, K)


def stats(seed: int, tokens: float = 10) -> Stats:
  rng = np.random.default_rng(seed)

  def one(*shape: int) -> np.ndarray:
    return tokens * rng.random((L, *shape)).astype(np.float32)

  return Stats(
    **{
      name: one(*{'pairs': (E, E), 'probs': (E,)}.get(name, ()))
      if name != 'tokens'
      else np.full(L, tokens, np.float32)
      for name in Stats._fields
    }
  )


def batch(seed: int, nll: list[float], tokens: list[float]) -> dict[str, object]:
  """The sums of a batch; each task's text is seven documents, of which it has some of one."""
  documents = np.zeros((len(nll), 7))
  documents[:, seed] = nll
  load = np.random.default_rng(seed).integers(1, 50, (L, E)).astype(np.float32)
  return {
    'task_nll': np.array(nll, np.float32),
    'task_tokens': np.array(tokens, np.float32),
    'document_nll': documents.ravel(),
    'load': load,
    'stats': stats(seed, sum(tokens) + 1),
  }


def corpus(*tasks: str) -> SimpleNamespace:
  sizes = tuple(Size(0, 0, 100 * (i + 1), 300, 3.0) for i in range(len(tasks)))
  return SimpleNamespace(
    tasks=tasks,
    sizes=sizes,
    validation_tokens=sum(s.validation_tokens for s in sizes),
    validation_bytes=sum(s.validation_bytes for s in sizes),
    documents=HeldOutDocuments(
      np.full(7 * len(tasks), 300 / 7), np.arange(7 * len(tasks)), np.repeat(range(len(tasks)), 7)
    ),
  )


def test_a_training_row_has_scalars_means_worsts_and_layers() -> None:
  layers = layer_statistics(np.array([[1, 2, 3, 4], [5, 5, 5, 5], [0, 0, 0, 9]], np.float32), K)
  metrics = {
    'lm_loss': np.float32(2.5),
    'nll': np.float32(2.0),
    'skipped': np.bool_(0),
    'stability': np.float32(0.05),
    'lm_loss/a': np.float32(math.nan),
    'load': np.ones((L, E)),
    'layers': layers,
  }
  row, listed = training_row(metrics, 4.0)
  assert row['perplexity'] == pytest.approx(math.exp(2)) and row['stability'] == pytest.approx(0.05)
  assert row['bits_per_byte'] == pytest.approx(2 / math.log(2) / 4) and row['skipped'] == 0
  assert (
    row['max_vio'] == layers['max_vio'].mean()
    and row['max_vio_worst'] == 3
    and row['expert_usage_worst'] == 0.25
  )
  assert set(listed) == set(layers) and listed['max_vio'] == pytest.approx([0.6, 0, 3])
  assert (
    'load' not in row
    and 'layers' not in row
    and all(isinstance(value, float) for value in row.values())
  )


def test_a_validation_is_the_ratio_of_sums_and_not_the_mean_of_ratios() -> None:
  batches = [batch(0, [300.0], [100]), batch(1, [10.0], [2])]
  sums = None
  for one in batches:
    sums = add_sums(sums, one)
  assert {leaf.dtype for leaf in (sums['load'], *sums['stats'])} == {np.dtype(np.float64)}
  row, layers = validation_row(sums, ROUTER, corpus(''), {'churn': np.array([0.1, 0.5, 0.3])})
  assert row['eval/lm_loss'] == pytest.approx(310 / 102)
  assert row['eval/perplexity'] == pytest.approx(math.exp(310 / 102))
  assert row['eval/bits_per_byte'] == pytest.approx(310 / 102 / math.log(2) * 100 / 300)
  load = batches[0]['load'].astype(np.float64) + batches[1]['load']
  vio = layer_statistics(load, K)['max_vio']
  assert row['eval/max_vio'] == pytest.approx(vio.mean()) and row[
    'eval/max_vio_worst'
  ] == pytest.approx(vio.max())
  peak = np.maximum(batches[0]['stats'].peak, batches[1]['stats'].peak)
  np.testing.assert_allclose(layers['logit_max'], peak, rtol=1e-5)
  entropy = (batches[0]['stats'].entropy + batches[1]['stats'].entropy) / (101 + 3)
  np.testing.assert_allclose(layers['router_entropy'], entropy, rtol=1e-5)
  assert row['eval/churn'] == pytest.approx(0.3) and row['eval/churn_worst'] == 0.5
  names = {*layer_statistics(load, K), *token_statistics(sums['stats']), 'churn'}
  assert set(layers) == names < set(STATISTICS) and all(
    len(values) == L for values in layers.values()
  )
  assert all(name.startswith('eval/') for name in row) and not any(
    name.endswith('/') for name in row
  )


def test_a_document_adds_up_over_rows_and_batches_and_padding_is_of_none() -> None:
  documents = np.array([[0, 0, 2], [2, 2, -1]])
  nll = np.array([[1, 2, 4], [8, 16, 32]], np.float32)
  assert sum_by_document(nll, documents, 4).tolist() == [3, 0, 28, 0]


def test_all_of_the_text_has_an_interval_and_a_part_has_none() -> None:
  whole, part = (
    add_sums(None, batch(3, [30.0, 50.0], tokens)) for tokens in ([100, 200], [100, 199])
  )
  row, _ = validation_row(whole, ROUTER, corpus('a', 'b'), {})
  for suffix in ('', '/a', '/b'):
    low, middle, high = (row[f'eval/bits_per_byte{p}{suffix}'] for p in ('_low', '', '_high'))
    assert low < middle < high
  low, middle, high = (row[f'eval/bits_per_byte{p}/a'] for p in ('_low', '', '_high'))
  # Of seven documents six have nothing: leaving one out gives 0 or 7/6 of the ratio.
  without = np.array([0] + [7 / 6] * 6) * middle
  spread = math.sqrt(6 / 7 * np.square(without - without.mean()).sum())
  assert (high - low) / 2 == pytest.approx(2.4469 * spread, rel=1e-3)
  assert (low + high) / 2 == pytest.approx(middle)
  row, _ = validation_row(part, ROUTER, corpus('a', 'b'), {})
  assert not any('_low' in name or '_high' in name for name in row)


def test_each_task_has_its_losses() -> None:
  row, _ = validation_row(
    add_sums(None, batch(0, [300.0, 50, 0], [100, 10, 0])),
    RouterConfig(E, K),
    corpus('a', 'b', 'c'),
    {},
  )
  assert row['eval/lm_loss'] == pytest.approx(350 / 110) and row['eval/lm_loss/a'] == pytest.approx(
    3
  )
  assert row['eval/lm_loss/b'] == pytest.approx(5) and math.isnan(row['eval/lm_loss/c'])
  assert row['eval/bits_per_byte/b'] == pytest.approx(5 / math.log(2) * 200 / 300)
  assert row['eval/perplexity/b'] == pytest.approx(math.exp(5)) and 'eval/churn' not in row
  assert not any(
    name.startswith('eval/lm_loss/')
    for name in validation_row(add_sums(None, batch(0, [3.0], [1])), ROUTER, corpus('alone'), {})[0]
  )


def test_perplexity_of_a_loss_that_is_not_finite_or_absurd() -> None:
  assert (
    perplexity(0.0) == 1 and math.isnan(perplexity(math.nan)) and math.isfinite(perplexity(1e9))
  )


ROW = {
  'lm_loss': 4.0331,
  'bits_per_byte': 1.6842,
  'max_vio': 0.254,
  'noise_floor': 0.101,
  'tokens_per_second': 8412.0,
  'balance/sequence': 1.2551,
  'balance/router_z': 0.5,
}


def test_progress_says_what_fits() -> None:
  assert progress_text(490, 500, ROW, 75, 0) == (
    'step 490/500  loss 4.033  bpb 1.684  router_z 0.500  sequence 1.255  MaxVio 0.25 '
    '(noise 0.10)  8.4k tok/s  1m15s left'
  )
  assert progress_text(490, 500, ROW, 75, 80) == (
    'step 490/500  loss 4.033  bpb 1.684  MaxVio 0.25 (noise 0.10)  8.4k tok/s  1m15s'
  )
  assert (
    progress_text(9, 5000, ROW, 75, 80)
    == 'step    9/5000  loss 4.033  bpb 1.684  MaxVio 0.25  8.4k tok/s  1m15s'
  )
  assert progress_text(490, 500, ROW, 75, 100).count('router_z') == 1
  for columns in range(70, 130):
    assert len(progress_text(490, 500, ROW, 75, columns)) <= columns


def test_clock() -> None:
  assert [clock(seconds) for seconds in (5, 75.4, 3599, 3660)] == [
    '0m05s',
    '1m15s',
    '59m59s',
    '1h01m',
  ]
