"""Sets of tokens: sums over them, and what part of the whole batch a micro-batch holds."""

import numpy as np
import pytest

from moejax.certify.batches import B, S
from moejax.certify.oracle import balance as oracle_balance
from moejax.moe.routing import RouterConfig
from moejax.moe.token_sets import (
  Scope,
  document_counts,
  document_parts,
  document_sums,
  even_parts,
  expert_load,
  ids_in_range,
  parts_of_set,
  row_loads,
  row_parts,
  row_sums,
  token_parts,
)
from tests.moe.balance.loss_cases import MAIN, cases, measured, routers


@routers(MAIN)
def test_load_counts_every_copy_of_every_token_that_counts(cfg: RouterConfig) -> None:
  for label, case in cases(cfg.num_experts).items():
    ids = measured(cfg, label)[3].expert_ids
    got = np.asarray(expert_load(ids, case.mask, cfg.num_experts))
    np.testing.assert_array_equal(got, oracle_balance.load(ids, case.mask, cfg.num_experts))
    assert got.sum() == case.mask.sum() * cfg.top_k and got.dtype == np.int32
  unassigned = np.where(np.arange(2) == 1, 8, ids)
  assert expert_load(unassigned, np.ones((B, S), bool), 8).sum() == B * S, (
    'an id of E is unassigned'
  )


# Two rows of four tokens; values are single bits, so that a sum names what is in it.
VALUES = 2.0 ** np.arange(8, dtype=np.float32).reshape(2, 4, 1)
SEGMENTS = np.array([[1, 1, 2, 0], [1, 2, 2, 3]], np.int32)


def test_sums_over_documents_are_of_each_segment_of_each_row() -> None:
  sums = np.asarray(document_sums(VALUES, SEGMENTS))
  assert sums.shape == (2 * 5, 1)
  np.testing.assert_array_equal(sums[:5, 0], [8, 1 + 2, 4, 0, 0])
  np.testing.assert_array_equal(sums[5:, 0], [0, 16, 32 + 64, 128, 0])


def test_sums_over_rows_are_of_as_many_rows_as_there_are_at_most() -> None:
  np.testing.assert_array_equal(row_sums(VALUES, 1)[:, 0], [15, 240])
  for rows in (0, 2, 8):
    np.testing.assert_array_equal(row_sums(VALUES, rows), [[255]])


def test_documents_with_any_ids_are_summed_each() -> None:
  """Ids past the length of a row, which a sum by segment would leave out; padding within one."""
  far = np.array([[70, 70, 9, 0], [-3, 8, 0, 8]], np.int32)
  sums = np.asarray(document_sums(VALUES, far))
  np.testing.assert_array_equal(sums[:5, 0], [8, 1 + 2, 4, 0, 0])
  np.testing.assert_array_equal(sums[5:, 0], [64, 16, 32 + 128, 0, 0])
  # Ids in range stay as they are, in order or not.
  turned = np.array([[2, 4, 1, 1], [1, 1, 0, 1]], np.int32)
  np.testing.assert_array_equal(ids_in_range(turned), turned)


@pytest.mark.parametrize('rows', [-1, 3, 5, 6])
def test_sets_that_rows_do_not_divide_into_are_refused(rows: int) -> None:
  """Of four rows: a reshape would make one set of them, or sets of other sizes."""
  four = np.ones((4, 2, 1), np.float32)
  with pytest.raises(ValueError, match=f'rows={rows} of a balance set with 4 rows.*rows=0'):
    row_sums(four, rows)
  with pytest.raises(ValueError, match='use a divisor or a multiple of 4'):
    parts_of_set(rows, 4)
  assert row_sums(four, 2).shape == (2, 1) and row_sums(four, 8).shape == (1, 1)


def test_micro_batches_weigh_what_they_hold_of_each_kind_of_set() -> None:
  """Four micro-batches of one row; a token counts where its segment is above 0."""
  segments = np.array([[[1, 1, 2, 2]], [[1, 0, 0, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 0]]], np.int32)
  tokens = (segments > 0)[..., None].astype(np.int32)
  half = Scope(rows=2)  # two micro-batches a set
  assert [parts_of_set(rows, 1) for rows in (0, 1, 2, 4)] == [1, 1, 2, 4]
  np.testing.assert_array_equal(token_parts(tokens, segments, half), [4, 1, 0, 3])
  np.testing.assert_array_equal(document_parts(tokens, segments, half), [2, 1, 0, 1])
  np.testing.assert_allclose(row_parts(tokens, segments, half), [0.8, 0.2, 0, 1], rtol=1e-6)
  np.testing.assert_array_equal(even_parts(tokens, segments, half), [0.5, 0.5, 0.5, 0.5])
  single = Scope(rows=1)
  for parts in (row_parts, even_parts):
    np.testing.assert_array_equal(parts(tokens, segments, single), [1, 1, 0, 1])


def test_each_micro_batch_of_a_whole_set_has_its_own_sets_share() -> None:
  """Three sets of two micro-batches of one row; the second set has no token."""
  segments = np.ones((6, 1, 4), np.int32)
  segments[2:4] = 0
  tokens = (segments > 0)[..., None].astype(np.float32)
  shares = even_parts(tokens, segments, Scope(rows=2))
  np.testing.assert_array_equal(shares, [0.5, 0.5, 0, 0, 0.5, 0.5])


def test_counts_are_whole_numbers_whatever_is_masked_or_unassigned() -> None:
  ids = np.array([[[0, 2], [3, -1], [1, 0]], [[2, 1], [0, 1], [7, 0]]], np.int32)  # of three
  mask = np.array([[True, True, False], [True, True, True]])
  np.testing.assert_array_equal(row_loads(ids, mask, 3), [[1, 0, 1], [2, 2, 1]])
  np.testing.assert_array_equal(expert_load(ids, mask, 3), [3, 2, 2])
  segments = np.array([[1, 2, 2], [1, 1, 3]], np.int32)
  counts = document_counts(ids, mask, segments, 3)
  # A token reads its own document: the masked one that of the token beside it.
  nothing = [0, 0, 0]
  want = [[[1, 0, 1], nothing, nothing], [[1, 2, 1], [1, 2, 1], [1, 0, 0]]]
  np.testing.assert_array_equal(counts.experts, want)
  np.testing.assert_array_equal(counts.copies, [[2, 0, 0], [4, 4, 1]])
  np.testing.assert_array_equal(counts.tokens, [[1, 1, 1], [2, 2, 1]])
  assert counts.documents == 4 and counts.experts.dtype == np.int32
