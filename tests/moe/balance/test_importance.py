"""Losses of how much a sum varies between experts."""

import numpy as np

from moejax.certify.cases import B, S
from tests.moe.balance.loss_cases import QUICKLY, SIGMOID, Row, balanced, measure


def test_what_varies_not_at_all_costs_nothing() -> None:
  """All experts with the same sums, of tokens that are far from indifferent."""
  logits = np.where(
    np.arange(8) == (np.arange(B)[:, None] * S + np.arange(S))[..., None] % 8, 5, -5
  )
  values = np.asarray(measure(logits.astype(np.float32), *balanced()[1:], SIGMOID)[0])
  # Ties among the other seven go to the lowest: importance is even only to what they weigh.
  assert abs(values[QUICKLY.index(Row('load'))]) < 1e-12
  assert values[QUICKLY.index(Row('importance'))] < 1e-3
