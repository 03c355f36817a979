"""Checkpoints: what is saved comes back, what is damaged is found, and nothing is lost in between."""

import json
import logging
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moejax.checkpoint import checkpoints as checkpoint
from moejax.checkpoint import lock as checkpoint_lock
from moejax.checkpoint import manifest
from moejax.checkpoint import reader as leaves
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.lock import RunInUse
from moejax.checkpoint.steps import Steps, steps_to_keep
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError
from moejax.sharding.tree import flatten, kinds

DATA = {'source': 'stdlib', 'seed': '0'}


class State(NamedTuple):
  step: jax.Array
  model: dict[str, dict[str, jax.Array]]
  router: jax.Array


def state(seed: int = 0) -> State:
  x = jax.random.normal(jax.random.key(seed), (64, 40))
  blocks = {'gate': x, 'up': x.astype(jnp.bfloat16)}
  return State(jnp.int32(seed), {'blocks': blocks}, jnp.full((2, 4), seed, jnp.float32))


@pytest.fixture
def root(tmp_path: Path) -> Path:
  """Steps 1, 2 and 3, each saved from state(step)."""
  write(tmp_path / 'c', {1: math.inf, 2: math.inf, 3: math.inf}, CheckpointConfig(keep_latest=3))
  return tmp_path / 'c'


def write(root: Path, metrics: dict[int, float], cfg: CheckpointConfig) -> list[int]:
  checkpoints = Checkpoints(root, cfg)
  for step, metric in metrics.items():
    checkpoints.save(step, state(step), DATA, metric)
  checkpoints.close()
  return checkpoints.steps.all()


def read(root: Path) -> tuple[int, State]:
  step, tree, _ = Checkpoints(root, CheckpointConfig(), readonly=True).restore(state(), DATA)
  assert manifest.digest(tree) == manifest.digest(state(step))  # whatever is returned is right
  return step, tree


def largest(directory: Path) -> Path:
  return max((p for p in directory.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


# ---- names and digests


class Layer(nnx.Module):
  def __init__(self) -> None:
    self.value = nnx.Param(jnp.ones(2))
    self.parts = nnx.List([nnx.Param(jnp.zeros(1))])


def test_names_are_ours_and_not_flaxs() -> None:
  assert list(flatten(state())) == ['step', 'model/blocks/gate', 'model/blocks/up', 'router']
  assert set(flatten({'model': Layer()})) == {'model/value', 'model/parts/0'}
  assert kinds(state())['model/blocks/up'] == 'bfloat16[64, 40]'


def test_leaves_of_one_name_and_leaves_not_of_jax_are_refused() -> None:
  with pytest.raises(TypeError, match='a/b: two leaves'):
    flatten({'a/b': jnp.ones(1), 'a': {'b': jnp.ones(1)}})
  with pytest.raises(TypeError, match='a is ndarray'):
    flatten({'a': np.ones(1)})


DTYPES = 'float64 int64 float32 uint32 bfloat16 float16 float8_e4m3fn int8 int4 bool'.split()


@pytest.mark.parametrize('dtype', DTYPES)
def test_digest_sees_every_bit_and_every_swap(dtype: str) -> None:
  with jax.enable_x64(True):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5), np.uint8)
    x = np.asarray(bits, jnp.dtype(dtype))
    base = manifest.digests({'x': jnp.asarray(x)})['x']
    assert base == manifest.digests({'x': jnp.asarray(x.copy())})['x']
    for i in range(x.size):
      for bit in range(1 if dtype in ('bool', 'int4') else 8 * x.itemsize):
        y = x.copy()
        y.reshape(-1).view(np.uint8)[i * x.itemsize + bit // 8] ^= 1 << bit % 8
        assert manifest.digests({'x': jnp.asarray(y)})['x'] != base
    y = x.reshape(-1).copy()
    a, b = int(np.flatnonzero(y == y[0])[0]), int(np.flatnonzero(y != y[0])[0])
    y[[a, b]] = y[[b, a]]
    assert manifest.digests({'x': jnp.asarray(y.reshape(x.shape))})['x'] != base


def test_digest_is_the_sums_it_says_it_is_and_the_same_on_every_mesh() -> None:
  x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype(np.float32)
  words = x.view(np.uint32).reshape(-1).astype(object)
  want = f'{sum(words) % 2**32:08x}{sum(w * (i + 1) for i, w in enumerate(words)) % 2**32:08x}'
  for shape in [(8, 1), (4, 2), (2, 4)]:
    mesh = jax.make_mesh(shape, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in [
      (),
      ('a',),
      (None, 'b', 'a') if shape == (4, 2) else (('b', 'a'),),
      ('b', None, None),
    ]:
      placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
      assert manifest.digests({'x': placed}) == {'x': want}


def test_one_digest_for_a_run_sees_names_kinds_and_bits() -> None:
  x = jnp.zeros((2, 3))
  trees = [{'a': x}, {'b': x}, {'a': x.T}, {'a': x.astype(jnp.int32)}, {'a': x.at[0, 0].set(-0.0)}]
  assert len({manifest.digest(t) for t in trees}) == len(trees)


# ---- save and restore


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


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path: Path) -> None:
  step = jax.jit(lambda x: x * -3 + 1, donate_argnums=0)
  x = jnp.arange(1 << 20, dtype=jnp.float32)
  want = manifest.digest({'x': x})
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, {'x': x}, DATA)
  for _ in range(5):
    x = step(x)
  checkpoints.close()
  _, back, _ = checkpoints.restore({'x': jax.ShapeDtypeStruct(x.shape, x.dtype)}, DATA)
  assert manifest.digest(back) == want


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


def test_a_failed_save_is_told_and_the_next_goes_well(
  root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=5))

  def full(*args: object, **kwargs: object) -> None:
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'rename', full)
  monkeypatch.setattr(Path, 'rename', full)
  checkpoints.save(4, state(4), DATA)
  with pytest.raises(SaveFailed, match='No space left'):
    checkpoints.check(wait=True)
  monkeypatch.undo()
  assert sorted(p.name for p in root.iterdir()) == ['1', '2', '3']
  checkpoints.check()  # told once
  checkpoints.save(5, state(5), DATA)
  checkpoints.close()
  assert read(root)[0] == 5


# ---- damage


def zero(path: Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


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


def test_a_leaf_among_many_leads_to_its_file(tmp_path: Path) -> None:
  """The tree of a large checkpoint has nodes below nodes, whose keys lack what they share."""
  options = {'max_inline_value_bytes': 10, 'max_decoded_node_bytes': 300}
  store = tensorstore.KvStore.open(
    {'driver': 'ocdbt', 'base': f'file://{tmp_path}/', 'config': options}
  ).result()
  for i in range(60):
    store[f'model/x{i:02}/0.0'] = b'z' * (50 + i)
  sizes = {i: leaves.files_of(tmp_path, [f'model/x{i:02}']) for i in range(60)}
  assert all(len(files) == 1 for files in sizes.values()) and len({*map(str, sizes.values())}) == 60
  assert [
    (tmp_path / name).stat().st_size >= 50 + i for i, files in sizes.items() for name in files
  ] == [True] * 60
  assert leaves.files_of(tmp_path, ['model/x1', 'x01', 'model']) == set()


def test_of_the_files_of_a_leaf_the_short_and_the_missing_are_named(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  chunks = {b'a/0': 'value:p/:d/1:0:50', b'a/1': 'value:p/:d/2:0:60', b'a/2': 'value:p/:d/2:60:10'}
  tree = {
    '': {'versions': [{'root': {'location': 'root'}}]},
    'root': {'entries': [{'key': key, 'indirect_value': value} for key, value in chunks.items()]},
  }
  monkeypatch.setattr(
    tensorstore.ocdbt, 'dump', lambda base, node='': SimpleNamespace(result=lambda: tree[node])
  )
  (tmp_path / 'p' / 'd').mkdir(parents=True)
  for first, second, named in (
    (50, 70, {'1', '2'}),
    (50, 69, {'2'}),
    (49, 70, {'1'}),
    (0, 0, {'1', '2'}),
  ):
    (tmp_path / 'p' / 'd' / '1').write_bytes(bytes(first))
    (tmp_path / 'p' / 'd' / '2').write_bytes(bytes(second))
    assert leaves.files_of(tmp_path, ['a']) == {f'p/d/{name}' for name in named}
  (tmp_path / 'p' / 'd' / '2').unlink()
  (tmp_path / 'p' / 'd' / '1').write_bytes(bytes(50))
  assert leaves.files_of(tmp_path, ['a']) == {'p/d/2'}


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


class Bomb:
  """Makes a directory when it is unpickled."""

  def __init__(self, path: Path) -> None:
    self.path = path

  def __reduce__(self) -> tuple[object, ...]:
    return os.mkdir, (str(self.path),)


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
  """The writer saves and deletes while the reader reads: what the reader ends with is the newest of all."""
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


def test_a_step_deleted_while_steps_are_listed_is_not_foreign(
  root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  (root / '4').mkdir()
  there = Path.is_symlink

  def asked(path: Path) -> bool:
    """Just before it is asked what they hold, steps 1 to 3 are deleted, and nothing else is."""
    for step in (1, 2, 3):
      if path == root / f'{step}':
        path.rename(root / f'{step}.gone')
    return there(path)

  with monkeypatch.context() as patch:
    patch.setattr(Path, 'is_symlink', asked)
    found = Steps(root, ('state', 'meta')).all()
  assert found == [] and len(caplog.records) == 1 and '/4 is' in caplog.text


# ---- another config


def test_another_fingerprint_names_both_values_of_each_field(root: Path) -> None:
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, CheckpointConfig()).restore(
      state(), {'source': 'kjv', 'seed': '0', 'mix': 'a'}
    )
  text = str(error.value)
  assert 'data source: stdlib in the checkpoint, kjv in the config' in text
  assert 'data mix: absent in the checkpoint, a in the config' in text and 'seed' not in text


@pytest.mark.parametrize(
  ('change', 'want'),
  [
    (
      lambda s: s._replace(router=s.router.astype(jnp.bfloat16)),
      'router: float32[2, 4] in the checkpoint, bfloat16[2, 4] in the config',
    ),
    (
      lambda s: s._replace(router=s.router[:1]),
      'router: float32[2, 4] in the checkpoint, float32[1, 4]',
    ),
    (lambda s: s._replace(model={}), 'model/blocks/up: bfloat16[64, 40] in the checkpoint, absent'),
    (lambda s: (s, s.router), '1: absent in the checkpoint, float32[2, 4]'),
  ],
)
def test_another_leaf_is_refused_and_never_a_reason_to_walk_back(
  root: Path, change: Callable[[State], object], want: str
) -> None:
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, CheckpointConfig(), readonly=True).restore(change(state()), DATA)
  assert want in str(error.value) and len(error.value.problems) > 1


def test_what_may_differ_is_named_and_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
  """Another seed brings other first rows; each is refused, or accepted by the name of its cause, and then told."""
  mine = {
    'source': 'stdlib',
    'seed': '1',
    'first_batch': 'abc',
    'model.top_k': '2',
    'model.new': '7',
  }
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=3))
  checkpoints.save(4, state(4), DATA | {'first_batch': 'aaa', 'model.top_k': '1', 'model.old': '7'})
  checkpoints.close()
  for accept, refused in (('', 3), ('seed', 1), ('model', 2), ('seed,data', 1), ('batch', 3)):
    with pytest.raises(ConfigError) as error:
      Checkpoints(root, CheckpointConfig(accept=accept)).restore(state(), mine)
    remedy, *lines = error.value.problems
    accepts = ','.join(sorted({*filter(None, accept.split(',')), 'model', 'seed'}))
    assert len(lines) == refused and f'--config.checkpoint.accept={accepts} ' in remedy
  assert (
    'model.top_k: 1 in the checkpoint, 2 in the config' in error.value.problems
    and not caplog.records
  )
  assert Checkpoints(root, CheckpointConfig(accept='model, seed')).restore(state(), mine)[0] == 4
  assert [r.getMessage() for r in caplog.records] == [
    'accepted: data first_batch: aaa in the checkpoint, abc in the config',
    'accepted: model.top_k: 1 in the checkpoint, 2 in the config',
    'accepted: data seed: 0 in the checkpoint, 1 in the config',
  ]


def test_nothing_makes_up_for_another_leaf(root: Path) -> None:
  every = CheckpointConfig(accept='batch,data,model,seed,tokenizer')
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, every).restore(state()._replace(router=jnp.zeros(1)), DATA | {'seed': '1'})
  assert error.value.problems[1:] == (
    'router: float32[2, 4] in the checkpoint, float32[1] in the config',
  )
  assert 'accept' not in error.value.problems[0]


def test_a_config_that_makes_no_sense_tells_all() -> None:
  with pytest.raises(ConfigError) as error:
    CheckpointConfig(every=0, keep_latest=0, keep_every=-1, accept='data,all')
  assert len(error.value.problems) == 4
  assert (
    "'all' is not one of ['batch', 'data', 'model', 'seed', 'tokenizer']" in error.value.problems[0]
  )


# ---- what stays


def test_latest_best_and_every_kth_stay(tmp_path: Path) -> None:
  metrics = {1: 5.0, 2: 1.0, 3: math.nan, 4: -math.inf, 5: 2.0, 6: math.inf, 7: 3.0}
  assert write(tmp_path, metrics, CheckpointConfig(keep_latest=2, keep_every=4)) == [2, 4, 6, 7]
  one = CheckpointConfig(keep_latest=1)
  assert write(tmp_path, {8: math.nan, 9: 4.0}, one) == [
    2,
    9,
  ]  # the best is still known after a restart
  assert write(tmp_path, {10: 0.5}, one) == [10]


def test_kept_for_random_metrics() -> None:
  assert steps_to_keep({1: 2.0, 2: 2.0, 3: 9.0}, latest=1, every=0, best=True) == {
    2,
    3,
  }  # of equals the later
  rng = np.random.default_rng(0)
  for _ in range(300):
    steps = sorted({int(s) for s in rng.integers(1, 40, rng.integers(0, 9))})
    metrics = {s: float(rng.choice([math.nan, math.inf, -math.inf, 1.0, 2.0, 3.0])) for s in steps}
    latest, every, best = int(rng.integers(1, 4)), int(rng.integers(0, 5)), bool(rng.integers(2))
    stay = steps_to_keep(metrics, latest, every, best)
    rest = stay - set(steps[-latest:]) - {s for s in steps if every and s % every == 0}
    assert set(steps[-latest:]) <= stay <= set(steps) and len(rest) <= best
    finite = [m for m in metrics.values() if math.isfinite(m)]
    assert all(metrics[s] == min(finite) for s in rest)
    assert not (best and finite) or min(finite) in {metrics[s] for s in stay}


# ---- who may write


def test_a_second_lock_names_the_process_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
  code = (
    'import sys, time; from moejax.checkpoint.lock import hold_run_directory as lock\n'
    'with lock(sys.argv[1]): print(1, flush=True); time.sleep(60)'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.read(1) == b'1'
    with (
      pytest.raises(RunInUse, match=f'in use by process {other.pid};'),
      checkpoint_lock.hold_run_directory(tmp_path),
    ):
      pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with checkpoint_lock.hold_run_directory(tmp_path):
      assert (tmp_path / 'lock').read_text() == f'{os.getpid()}\n'


def test_only_the_writer_takes_rubbish_away(root: Path) -> None:
  rubbish = [
    root / '4.orbax-checkpoint-tmp',
    root / '5.orbax-checkpoint-tmp-123',
    root / '1.deleted',
  ]
  for path in rubbish:
    shutil.copytree(root / '1', path)
  reader = Checkpoints(root, CheckpointConfig(), readonly=True)
  assert reader.restore(state(), DATA)[0] == 3 and all(p.exists() for p in rubbish)
  Checkpoints(root, CheckpointConfig())
  assert not any(p.exists() for p in rubbish)


def test_pruning_leaves_the_save_in_flight_alone(root: Path) -> None:
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=1))
  flying = root / '9.orbax-checkpoint-tmp'
  flying.mkdir()
  checkpoints.check()
  assert checkpoints.steps.all() == [3] and flying.exists()


def test_a_reader_changes_nothing(root: Path) -> None:
  before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
  read(root)
  assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == before


WRITER = """
import sys
import jax.numpy as jnp
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.checkpoint.lock import hold_run_directory as lock
with lock(sys.argv[1]):
  checkpoints = Checkpoints(sys.argv[1] + '/c', CheckpointConfig(keep_latest=2))
  done = checkpoints.restore({'x': jnp.zeros((400, 1000))}, {})
  step = done[0] if done else 0
  assert not done or (done[1]['x'] == step).all()
  print('at', step, flush=True)
  while True:
    step += 1
    checkpoints.save(step, {'x': jnp.full((400, 1000), step, jnp.float32)}, {})
    print('saving', step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_time_the_newest_whole_step_is_there(tmp_path: Path) -> None:
  rng, last = np.random.default_rng(0), 0
  for _ in range(5):
    command = [sys.executable, '-c', WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
      at = int(run.stdout.readline().split()[1])
      assert at >= last - 1  # the one in flight may be lost, and none before it
      for _ in range(int(rng.integers(2, 6))):
        last = int(run.stdout.readline().split()[1])
      run.send_signal(signal.SIGKILL)
      last = max([last, *(int(line.split()[1]) for line in run.stdout)])
  checkpoints = Checkpoints(tmp_path / 'c', CheckpointConfig())
  assert checkpoints.restore({'x': jnp.zeros((400, 1000))}, {})[0] >= last - 1
  assert all(p.name.isdecimal() for p in (tmp_path / 'c').iterdir())


def test_import_is_cheap() -> None:
  code = 'import sys, moejax.checkpoint; print({"orbax", "tensorstore"} & sys.modules.keys())'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert run.stdout == 'set()\n'


def test_meta_is_plain_json(root: Path) -> None:
  assert json.loads((root / '3' / 'meta' / 'metadata').read_text())['meta']['metric'] is None
