"""Leaves that are read a layer at a time: the same numbers, the same digests, the same damage."""

import logging
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from moejax.checkpoint import manifest
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.reader import Damaged
from moejax.checkpoint.stored_leaves import StoredLeaves, open_leaves
from moejax.config import ConfigError
from moejax.sharding.tree import kinds
from tests.checkpoint.saved_steps import flip, largest, state


def reader(root: Path) -> Checkpoints:
  return Checkpoints(root, CheckpointConfig(), readonly=True)


def layer_by_layer(step: int, stored: StoredLeaves) -> dict[str, np.ndarray]:
  """What two of the leaves hold, and the number of the step; verified."""
  rows = {}
  for name in ('gate', 'up'):
    # From the last to the first: the order says nothing.
    parts = [stored.read(f'model/blocks/{name}', row) for row in reversed(range(64))]
    rows[name] = np.stack(parts[::-1])
  stored.verify()
  return rows | {'step': step}


@pytest.mark.parametrize('shape', [(5,), (3, 7), (4, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32'])
def test_the_sums_of_parts_are_those_of_the_digest(
  shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(manifest, 'POSITIONS', np.arange(1, 8, dtype=np.uint32))
  leaf = np.random.default_rng(0).standard_normal(shape).astype(jnp.dtype(dtype)) - 1
  total = np.zeros(2, np.uint32)
  for i, part in enumerate(leaf):
    total += manifest.sums_of_part(np.asarray(part), i * leaf[0].size)
  assert manifest.digest_of_sums(*total) == manifest.digests({'': jnp.asarray(leaf)})['']


def test_the_newest_step_is_read_in_parts(root: Path) -> None:
  found = reader(root).read_in_parts(state(), layer_by_layer)
  assert found['step'] == 3
  for name, leaf in state(3).model['blocks'].items():
    assert found[name].tobytes() == np.asarray(leaf).tobytes() and found[name].dtype == leaf.dtype


def test_a_damaged_step_is_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
  """One whose file TensorStore cannot read, and one that reads well and is of another step."""
  shutil.rmtree(root / '2' / 'state')
  shutil.copytree(root / '1' / 'state', root / '2' / 'state')
  flip(largest(root / '3' / 'state'))
  assert reader(root).read_in_parts(state(), layer_by_layer)['step'] == 1
  warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  assert [warning[:13] for warning in warnings] == ['checkpoint 3 ', 'checkpoint 2 ']
  assert all('leaf model/blocks/gate' in warning for warning in warnings)
  assert 'does not match its digest' in warnings[1]
  flip(largest(root / '1' / 'state'))
  with pytest.raises(NoLoadableCheckpoint):
    reader(root).read_in_parts(state(), layer_by_layer)


def test_where_nothing_was_saved_nothing_is_used(tmp_path: Path) -> None:
  assert reader(tmp_path).read_in_parts(state(), layer_by_layer) is None


def test_another_model_is_an_error_and_no_damage(root: Path) -> None:
  with pytest.raises(ConfigError, match='model/blocks/gate'):
    other = state()
    other.model['blocks']['gate'] = jnp.zeros((64, 41))
    reader(root).read_in_parts(other, layer_by_layer)


def test_what_is_not_counted_once_is_not_verified(root: Path) -> None:
  digests = manifest.digests(state(3))
  for rows in (range(63), [*range(64), 0]):
    with open_leaves(root / '3' / 'state', kinds(state()), digests) as stored:
      for row in rows:
        stored.read('model/blocks/gate', row)
      with pytest.raises(RuntimeError, match='of its 2560 numbers were counted'):
        stored.verify()
  with open_leaves(root / '3' / 'state', kinds(state()), digests) as stored:
    stored.read('model/blocks/gate')
    stored.read('model/blocks/gate', 5, counts=False)
    stored.verify()
  with open_leaves(root / '3' / 'state', kinds(state()), digests | {'router': '0' * 16}) as stored:
    stored.read('router')
    with pytest.raises(Damaged, match='leaf router, file .* does not match its digest'):
      stored.verify()


def test_of_a_large_stack_a_layer_is_read_alone_and_a_small_leaf_once(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  large = jnp.arange(3 * 512 * 512, dtype=jnp.float32).reshape(3, 512, 512)
  tree = {'large': large, 'small': jnp.arange(12.0).reshape(3, 2, 2)}
  writer = Checkpoints(tmp_path, CheckpointConfig())
  writer.save(1, tree, {})
  writer.close()
  opened: list[tuple[int, ...]] = []
  open_array = tensorstore.open

  def open_and_tell(*args: object, **kwargs: object) -> object:
    found = open_array(*args, **kwargs)
    opened.append(found.result().chunk_layout.read_chunk.shape)
    return found

  monkeypatch.setattr(tensorstore, 'open', open_and_tell)
  digests = manifest.digests(tree)
  with open_leaves(tmp_path / '1' / 'state', kinds(tree), digests) as stored:
    for layer in range(3):
      for path, leaf in tree.items():
        assert (stored.read(path, layer) == np.asarray(leaf[layer])).all()
    stored.verify()
  assert sorted(opened) == [(1, 512, 512)] * 3 + [(3, 2, 2)]
