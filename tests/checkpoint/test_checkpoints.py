"""Checkpoints: what is saved comes back, and what is damaged is found and passed over."""

import logging
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import checkpoints as checkpoint
from moejax.checkpoint import manifest
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints, NoLoadableCheckpoint
from moejax.config import ConfigError
from tests.checkpoint.saved_steps import (
  DATA,
  Bomb,
  Layer,
  cut,
  flip,
  largest,
  read,
  state,
  write,
  zero,
)


def test_what_is_saved_comes_back_on_another_mesh(root: Path) -> None:
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape,
      x.dtype,
      sharding=NamedSharding(
        mesh, PartitionSpec('a', 'b') if x.shape == (64, 40) else PartitionSpec()
      ),
    ),
    state(),
  )
  step, tree, meta = Checkpoints(root, CheckpointConfig(), readonly=True).restore(target, DATA)
  assert step == 3 and manifest.digest(tree) == manifest.digest(state(3))
  assert jax.tree.map(lambda x: x.sharding, tree) == jax.tree.map(lambda x: x.sharding, target)
  assert (
    meta.fingerprint == DATA
    and meta.metric == math.inf
    and meta.digests == manifest.digests(state(3))
  )


def test_modules_and_empty_leaves_come_back(tmp_path: Path) -> None:
  tree = {'model': Layer(), 'router': jnp.zeros((0, 4)), 'n': jnp.int32(7)}
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(5, tree, DATA, 0.0)
  checkpoints.close()
  _, back, meta = Checkpoints(tmp_path, CheckpointConfig(), readonly=True).restore(tree, DATA)
  assert manifest.digest(back) == manifest.digest(tree) and isinstance(back['model'], Layer)
  assert meta.metric == 0.0 and back['router'].shape == (0, 4)


def test_a_reader_of_a_part_gives_its_prefixes(root: Path) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(), readonly=True)
  target = {'model': state().model, 'router': state().router}
  step, tree, _ = checkpoints.restore(target, {}, only=('model/', 'router'))
  assert step == 3 and manifest.digest(tree['model']) == manifest.digest(state(3).model)
  with pytest.raises(ConfigError, match='step: int32.* in the checkpoint, absent'):
    checkpoints.restore(target, {})


def test_nothing_there_is_none(tmp_path: Path) -> None:
  assert (
    Checkpoints(tmp_path / 'no', CheckpointConfig(), readonly=True).restore(state(), DATA) is None
  )
  assert not (tmp_path / 'no').exists()
  assert Checkpoints(tmp_path / 'new', CheckpointConfig()).restore(state(), DATA) is None


def test_saving_at_or_below_the_newest_is_an_error(root: Path) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=3))
  for step in (1, 3):
    with pytest.raises(ValueError, match=f'step={step} is not after 3'):
      checkpoints.save(step, state(9), DATA)
  checkpoints.close()
  assert read(root)[0] == 3


def of(pattern: str) -> Callable[[Path], Path]:
  return lambda step: max(step.glob(pattern), key=lambda path: path.stat().st_size)


# Part of a step -> its file, and the leaf that the message names if the file is of leaves.
FILES = {
  'chunks': (of('state/ocdbt.process_0/d/*'), 'model/blocks/gate'),
  'tree': (of('state/d/*'), 'step'),
  'manifest': (of('state/manifest.ocdbt'), 'step'),
  'table': (of('state/_METADATA'), ''),
  'shapes': (of('state/array_metadatas/*'), ''),
  'meta': (of('meta/metadata'), ''),
}

NOT_NEEDED = {('shapes', 'unlink')}  # Orbax finds out the same


@pytest.mark.parametrize('part', FILES)
@pytest.mark.parametrize('harm', [flip, zero, cut, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_file_is_named_with_its_leaf_and_the_step_before_is_used(
  root: Path,
  part: str,
  harm: Callable[[Path], None],
  caplog: pytest.LogCaptureFixture,
  capfd: pytest.CaptureFixture[str],
) -> None:
  find, leaf = FILES[part]
  file = find(root / '3')
  harm(file)
  assert read(root)[0] == (3 if (part, harm.__name__) in NOT_NEEDED else 2)
  warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
  assert (
    len(warnings) == ((part, harm.__name__) not in NOT_NEEDED)
    and 'Traceback' not in capfd.readouterr().err
  )
  for warning in warnings:
    assert (
      warning.startswith('checkpoint 3 is damaged, trying an older one: ') and len(warning) < 400
    )
    assert str(file.relative_to(root / '3')) in warning and '\n' not in warning, warning
    assert f'leaf {leaf}, file' in warning or not leaf or 'every leaf' in warning, warning
    assert ('missing' in warning or 'No such file' in warning) == (harm is Path.unlink), warning


@pytest.mark.parametrize('where', ['state', 'meta/metadata', 'state/manifest.ocdbt', 'state/d'])
def test_a_link_inside_a_step_is_not_followed(
  root: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
  place = root / '3' / where
  place.rename(root.parent / 'elsewhere')
  place.symlink_to(root.parent / 'elsewhere')
  assert read(root)[0] == 2
  assert f'{where} is a link, and links are not followed' in caplog.text


def test_a_pickle_in_place_of_a_file_is_never_run(root: Path, tmp_path: Path) -> None:
  for file in [path for path in (root / '3').rglob('*') if path.is_file()]:
    file.write_bytes(pickle.dumps(Bomb(tmp_path / 'run')))
  assert read(root)[0] == 2 and not (tmp_path / 'run').exists()


def test_a_wrong_array_that_reads_well_is_found(
  root: Path, caplog: pytest.LogCaptureFixture
) -> None:
  shutil.rmtree(root / '3' / 'state')
  shutil.copytree(root / '2' / 'state', root / '3' / 'state')
  assert read(root)[0] == 2
  assert (
    'leaf model/blocks/gate, model/blocks/up, router and 1 more, file state/ocdbt.process_0/d/'
    in caplog.text
  )
  assert 'does not match its digest' in caplog.text


def test_every_checkpoint_bad_is_a_refusal_and_deletes_nothing(root: Path) -> None:
  for step in (1, 2, 3):
    flip(largest(root / str(step) / 'state'))
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=1))
  with pytest.raises(NoLoadableCheckpoint, match=r'\[3, 2, 1\]'):
    checkpoints.restore(state(), DATA)
  assert checkpoints.steps.all() == [1, 2, 3]


def test_bad_later_steps_go_when_the_writer_saves_again(root: Path) -> None:
  flip(largest(root / '3' / 'state'))
  reader = Checkpoints(root, CheckpointConfig(), readonly=True)
  assert reader.restore(state(), DATA)[0] == 2 and (root / '3').exists()
  writer = Checkpoints(root, CheckpointConfig(keep_latest=2))
  assert writer.restore(state(), DATA)[0] == 2
  writer.check()
  assert writer.steps.all() == [
    1,
    2,
    3,
  ]  # 3 is evidence, and counts for nothing: 1 and 2 are the latest
  writer.save(3, state(3), DATA)
  writer.close()
  assert writer.steps.all() == [2, 3] and read(root)[0] == 3


def test_foreign_directories_are_ignored_with_a_warning(
  root: Path, caplog: pytest.LogCaptureFixture
) -> None:
  (root / '77').mkdir()
  (root / '88').mkdir()
  (root / '88' / 'notes.txt').write_text('mine')
  (root / '99').symlink_to(root / '3')
  (root / '007').mkdir()
  assert read(root)[0] == 3
  assert [r.getMessage().split()[0].rpartition('/')[2] for r in caplog.records] == [
    '77',
    '88',
    '99',
  ]
  caplog.clear()
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=1))
  checkpoints.save(4, state(4), DATA)
  checkpoints.close()
  assert len(caplog.records) == 3
  assert read(root)[0] == 4 and (root / '88' / 'notes.txt').exists() and (root / '77').exists()


def test_only_foreign_directories_are_no_checkpoint(tmp_path: Path) -> None:
  (tmp_path / '5').mkdir()
  assert Checkpoints(tmp_path, CheckpointConfig()).restore(state(), DATA) is None


def test_a_step_deleted_under_a_reader_is_no_damage(
  root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  """The writer saves and deletes while the reader reads, which ends with the newest of all."""
  write(root.parent / 'd', {4: math.inf}, CheckpointConfig())
  load = checkpoint.read_leaves

  def meanwhile(directory: Path, *rest: object) -> list[jax.Array]:
    if directory.parent.name == '3':
      for step in (1, 2, 3):
        shutil.rmtree(root / str(step))
      (root.parent / 'd' / '4').rename(root / '4')
    return load(directory, *rest)

  monkeypatch.setattr(checkpoint, 'read_leaves', meanwhile)
  assert read(root)[0] == 4 and not caplog.records


def test_a_config_that_makes_no_sense_tells_all() -> None:
  with pytest.raises(ConfigError) as error:
    CheckpointConfig(every=0, keep_latest=0, keep_every=-1, accept='data,all')
  assert len(error.value.problems) == 4
  assert (
    "'all' is not one of ['batch', 'data', 'model', 'seed', 'tokenizer']" in error.value.problems[0]
  )


def test_a_reader_changes_nothing(root: Path) -> None:
  before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
  read(root)
  assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == before


def test_import_is_cheap() -> None:
  code = 'import sys, moejax.checkpoint; print({"orbax", "tensorstore"} & sys.modules.keys())'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout == 'set()\n'


def test_counts_that_were_saved_as_float32_come_back_as_integers(tmp_path: Path) -> None:
  """As they were before they were integers; other numbers are still those of another run."""
  counts = jnp.array([[3.0, 2.0**24], [0.0, 7.0]])
  for step, lagged in enumerate((counts, counts + 0.5), 1):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(step, {'lagged': lagged, 'n': jnp.int32(7)}, DATA, 0.0)
    checkpoints.close()
    target = {'lagged': counts.astype(jnp.int32), 'n': jnp.int32(0)}
    reader = Checkpoints(tmp_path, CheckpointConfig(), readonly=True)
    if step == 1:
      back = reader.restore(target, DATA).tree
      assert back['lagged'].dtype == jnp.int32 and back['n'] == 7
      assert (back['lagged'] == target['lagged']).all()
    else:
      with pytest.raises(ConfigError, match='a leaf of float32 is not one of int32'):
        reader.restore(target, DATA)
  # Nothing else is cast: integers as floats, or floats of another width.
  for kind in (jnp.bfloat16, jnp.int16, jnp.uint32):
    with pytest.raises(ConfigError, match=r'lagged: float32\[2, 2\] in the checkpoint'):
      reader.restore({'lagged': counts.astype(kind), 'n': jnp.int32(0)}, DATA)


def test_parameters_that_were_saved_in_bfloat16_are_the_same_numbers_in_float32(
  tmp_path: Path,
) -> None:
  """As of an import in half the room; a reader that only computes may take them as they lie."""
  saved = {'w': jnp.array([1.5, -3e38, 1 / 3], jnp.bfloat16)}
  writer = Checkpoints(tmp_path, CheckpointConfig())
  writer.save(0, saved, DATA)
  writer.close()
  reader = Checkpoints(tmp_path, CheckpointConfig(), readonly=True)
  target = {'w': jax.ShapeDtypeStruct((3,), jnp.float32)}
  wide = reader.restore(target, DATA).tree['w']
  assert wide.dtype == jnp.float32 and (wide == saved['w'].astype(jnp.float32)).all()
  assert manifest.digest(reader.restore(target, DATA, keep_dtypes=True).tree) == (
    manifest.digest(saved)
  )
  with pytest.raises(ConfigError, match=r'w: bfloat16\[3\] in the checkpoint'):
    reader.restore({'w': jax.ShapeDtypeStruct((3,), jnp.float16)}, DATA)
