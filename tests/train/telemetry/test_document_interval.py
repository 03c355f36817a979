"""The interval over documents: its width by hand, what it holds, and what is one draw."""

import math

import numpy as np
import pytest

from moejax.train.telemetry.document_interval import bits_per_byte_interval, student_t


def test_students_t_is_that_of_tables() -> None:
  for freedom, value in ((4, 2.7764), (9, 2.2622), (39, 2.0227), (10**6, 1.95996)):
    assert student_t(0.975, freedom) == pytest.approx(value, rel=0.01 / freedom + 1e-4)


def test_of_documents_of_one_size_it_is_that_of_a_mean() -> None:
  """The jackknife of a mean is its standard error, exactly."""
  nll = np.array([3.0, 5, 4, 8, 6, 4])
  bits = nll / math.log(2) / 10
  low, high = bits_per_byte_interval(nll, np.full(6, 10), np.arange(6))
  half = student_t(0.975, 5) * bits.std(ddof=1) / math.sqrt(6)
  assert (low, high) == pytest.approx((bits.mean() - half, bits.mean() + half))


def test_near_copies_are_one_draw_in_whatever_order() -> None:
  rng = np.random.default_rng(0)
  nll, sizes = rng.random(12) * 9 + 1, rng.integers(1, 99, 12)
  once = bits_per_byte_interval(nll, sizes, np.arange(12))
  order = rng.permutation(36)
  copied = [np.tile(values, 3)[order] for values in (nll, sizes, np.arange(12))]
  assert bits_per_byte_interval(*copied) == pytest.approx(once)
  apart = bits_per_byte_interval(*copied[:2], np.arange(36))
  assert apart.high - apart.low < 0.7 * (once.high - once.low)


def test_it_holds_the_ratio_of_the_whole_as_often_as_it_says() -> None:
  """A ratio of sums, far from the mean over documents: long ones are easier."""
  rng = np.random.default_rng(1)
  sizes = np.exp(rng.normal(8, 0.6, 200_000))
  nll = sizes * (2 + 0.4 * rng.normal(size=len(sizes)) - 0.2 * (np.log(sizes) - 8))
  truth = nll.sum() / sizes.sum() / math.log(2)
  held = 0
  for _ in range(400):
    drawn = rng.integers(0, len(sizes), 60)
    low, high = bits_per_byte_interval(nll[drawn], sizes[drawn], np.arange(60))
    held += low <= truth <= high
  assert 0.91 <= held / 400 <= 0.985


def test_of_few_documents_there_is_none() -> None:
  for groups in ([0, 1, 2, 3], [0, 0, 0, 0, 1, 2, 3]):
    count = len(groups)
    found = bits_per_byte_interval(np.arange(count) + 1.0, np.full(count, 9), np.array(groups))
    assert math.isnan(found.low) and math.isnan(found.high)
