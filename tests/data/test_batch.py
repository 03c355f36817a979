"""Batches and positions, of NumPy and of JAX alike, against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.batch import IGNORE, Batch, make_batch, positions_in

KINDS = [np.asarray, jnp.asarray]


def positions_by_loop(segment_ids: np.ndarray) -> list[list[int]]:
  """One token after another: 0 where a document starts and in padding, else one more."""
  rows = []
  for row in segment_ids.tolist():
    positions: list[int] = []
    for column, segment in enumerate(row):
      goes_on = column > 0 and segment == row[column - 1]
      positions.append(positions[-1] + 1 if goes_on and segment > 0 else 0)
    rows.append(positions)
  return rows


def random_segments(rng: np.random.Generator, B: int, S: int) -> np.ndarray:
  """Documents 1, 2, ... of random lengths, and padding behind."""
  segments = 1 + np.cumsum(rng.random((B, S)) < 0.3, axis=1)
  ends = rng.integers(0, S + 1, size=(B, 1))
  return np.where(np.arange(S) < ends, segments, 0)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('S', [1, 2, 7, 33])
def test_positions_are_those_of_a_slow_loop(kind: object, S: int) -> None:
  segments = random_segments(np.random.default_rng(S), 16, S)
  positions = positions_in(kind(segments.astype(np.int32)))
  assert isinstance(positions, jax.Array if kind is jnp.asarray else np.ndarray)
  assert positions.dtype == np.int32 and positions.shape == (16, S)
  assert positions.tolist() == positions_by_loop(segments)


@pytest.mark.parametrize('kind', KINDS)
def test_padding_in_front_and_between_documents_has_position_0(kind: object) -> None:
  segments = kind(np.array([[0, 0, 1, 1, 1], [1, 1, 0, 2, 2], [3, 3, 1, 1, 3], [0, 0, 0, 0, 0]]))
  wanted = [[0, 0, 0, 1, 2], [0, 1, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
  assert positions_in(segments).tolist() == wanted


def test_positions_under_jit_are_those_outside() -> None:
  segments = jnp.asarray(random_segments(np.random.default_rng(0), 4, 12))
  np.testing.assert_array_equal(jax.jit(positions_in)(segments), positions_in(segments))


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_of_tokens_alone_is_rows_of_one_document_without_targets(kind: object) -> None:
  batch = make_batch(kind(np.arange(6).reshape(2, 3)))
  assert batch.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
  assert (np.asarray(batch.targets) == IGNORE).all() and not np.asarray(batch.mask).any()
  assert (np.asarray(batch.segment_ids) == 1).all()
  assert batch.positions.tolist() == [[0, 1, 2]] * 2 and batch.task_ids.tolist() == [0, 0]


@pytest.mark.parametrize('kind', KINDS)
def test_every_field_is_as_given_and_of_the_kind_and_type_of_the_record(kind: object) -> None:
  rng = np.random.default_rng(1)
  segments = random_segments(rng, 3, 8)
  tokens = rng.integers(0, 99, (3, 8))
  targets = np.where(segments > 0, rng.integers(0, 99, (3, 8)), IGNORE)
  given = {'tokens': tokens, 'targets': targets, 'segment_ids': segments}
  given['task_ids'] = np.array([2, 0, 1])
  batch = make_batch(**{name: kind(array.astype(np.int32)) for name, array in given.items()})
  for name, array in given.items():
    np.testing.assert_array_equal(getattr(batch, name), array, err_msg=name)
  np.testing.assert_array_equal(batch.mask, targets != IGNORE)
  assert batch.positions.tolist() == positions_by_loop(segments)
  for name, array in zip(Batch._fields, batch, strict=True):
    assert array.dtype == (bool if name == 'mask' else np.int32), name
    assert isinstance(array, jax.Array if kind is jnp.asarray else np.ndarray), name
  moved = make_batch(kind(tokens.astype(np.int32)), positions=kind(segments.astype(np.int32)))
  np.testing.assert_array_equal(moved.positions, segments)
