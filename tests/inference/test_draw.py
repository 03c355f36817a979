"""Draws have the probabilities that temperature, top-k and top-p leave."""

import jax
import numpy as np
import pytest

from moejax.inference.draw import draw, largest_mask
from tests.inference.decode_cases import sampling_params
from tests.support.quick import QUICK

PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])
draw_quickly = jax.jit(draw, compiler_options=QUICK)


def frequencies(
  logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
  """How often each token comes, of 4000 draws."""
  params = sampling_params(temperature, top_k, top_p)
  rows = np.tile(logits.astype(np.float32), (4, 1000, 1))
  tokens = draw_quickly(rows, np.tile(np.arange(1000), (4, 1)), params)
  return np.bincount(np.asarray(tokens).ravel(), minlength=len(logits)) / 4000


@pytest.mark.parametrize(
  ('settings', 'kept'),
  [
    *(
      ({'top_p': p}, kept)
      for p, kept in ((1.0, 4), (0.96, 4), (0.9, 3), (0.79, 2), (0.49, 1), (0.3, 1), (1e-6, 1))
    ),
    *(({'top_k': k}, kept) for k, kept in ((0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (9, 4))),
    ({'top_k': 3, 'top_p': 0.8}, 2),
    ({'top_k': 2, 'top_p': 0.62}, 1),
    ({'top_k': 2, 'top_p': 0.63}, 2),
  ],
  ids=str,
)
def test_draws_are_from_the_likeliest_alone(settings: dict[str, float], kept: int) -> None:
  """top_p is of what top_k leaves: of two, the first has 0.625. The likeliest is not the first."""
  order = np.array([2, 0, 3, 1])
  probs, logits = np.zeros(4), np.empty(4)
  probs[order[:kept]] = PROBABILITIES[:kept] / PROBABILITIES[:kept].sum()
  logits[order] = np.log(PROBABILITIES)
  drawn = frequencies(logits, **settings)
  np.testing.assert_allclose(drawn, probs, atol=0.03)
  assert ((drawn > 0) == (probs > 0)).all()


@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_temperature_flattens_or_sharpens(temperature: float) -> None:
  want = PROBABILITIES ** (1 / temperature)
  drawn = frequencies(np.log(PROBABILITIES), temperature)
  np.testing.assert_allclose(drawn, want / want.sum(), atol=0.03)
  # At temperature 2 the likeliest has 0.38 only: a nucleus of 0.5 holds two.
  assert (frequencies(np.log(PROBABILITIES), 2.0, top_p=0.5) > 0).sum() == 2
  assert (frequencies(np.log(PROBABILITIES), 0.0, top_k=4, top_p=0.5) == [1, 0, 0, 0]).all()


@pytest.mark.parametrize('spread', [1e-3, 1.0, 100.0])
def test_the_foremost_are_those_that_a_sort_would_find(spread: float) -> None:
  """Signs, zeros, infinities and ties, for a count and for a mass."""
  rng = np.random.default_rng(0)
  x = (spread * rng.normal(size=(6, 1000))).astype(np.float32)
  x[1, ::3], x[2, 1::2], x[3] = 0.0, -np.inf, np.abs(x[3])
  x[4] = np.round(x[4]) + 0.0  # no -0, which is less than 0 here
  x[5] = rng.permutation(1000).astype(np.float32) * np.float32(2.0**-23) + 1  # neighbours
  probs = np.asarray(jax.nn.softmax(x))
  for weights, amounts in ((np.ones_like(x), (1, 7, 400, 1000)), (probs, (1e-3, 0.3, 0.9, 0.999))):
    for amount in amounts:
      got = np.asarray(largest_mask(x, weights, amount, True))
      for row in range(len(x)):
        order = np.argsort(-x[row], kind='stable')
        total = np.cumsum(weights[row][order].astype(np.float64))
        reached = np.searchsorted(total, amount * (1 - 1e-6))
        least = x[row][order[min(reached, 999)]]
        np.testing.assert_array_equal(got[row], x[row] >= least, err_msg=f'{row=} {amount=}')
