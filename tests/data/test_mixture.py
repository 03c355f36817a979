"""A mixture: rows come from the text that their task id says, as often as its weight says, and no test text trains."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import grain
import numpy as np
import pytest

from moejax.config import ConfigError, flags, from_config_dict, frozendict, to_config_dict
from moejax.data import mixture, sources, token_stream
from moejax.data.batch import Batch
from moejax.data.holdout import digest_of, survey_of
from moejax.data.pipeline import Data, open_data
from moejax.data.rows import Rows
from moejax.data.sources import DataConfig
from moejax.data.tokenizer import Tokenizer, load_tokenizer

S, B = 16, 6
LETTERS = {
  'code': 'abc',
  'maths': 'pqrs',
  'notes': 'xyz火',
}  # each task its own: a row's letters tell its text
EOD = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A folder a task, of many documents; notes has few and so goes round often."""
  for seed, (task, count) in enumerate({'code': 90, 'maths': 60, 'notes': 25}.items()):
    rng = np.random.default_rng(seed)
    (tmp_path / task).mkdir()
    for i in range(count):
      text = ''.join(rng.choice(list(LETTERS[task]), int(rng.integers(5, 120)))) + '\n'
      (tmp_path / task / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return tmp_path


def _config(folder: Path, weights: dict[str, float], **fields: object) -> DataConfig:
  table = frozendict({task: f'{weight} text {folder}/{task}/*' for task, weight in weights.items()})
  usual = {
    'source': 'mixture',
    'mixture': table,
    'tokenizer': 'bytes',
    'cache_dir': f'{folder}/cache',
  }
  return DataConfig(**usual | fields)


def _open(
  folder: Path,
  weights: dict[str, float] | None = None,
  batch_size: int = B,
  seq_len: int = S,
  seed: int = 0,
  **fields: object,
) -> Data:
  config = _config(folder, weights or {'code': 5, 'maths': 3, 'notes': 2}, **fields)
  return open_data(config, batch_size=batch_size, seq_len=seq_len, seed=seed)


def _plain(folder: Path, task: str) -> Data:
  config = DataConfig(
    source='text', path=f'{folder}/{task}/*', tokenizer='bytes', cache_dir=f'{folder}/plain'
  )
  return open_data(config, batch_size=1, seq_len=S, seed=0)


def _equal(a: Batch, b: Batch) -> bool:
  return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def _rows(batches: Iterable[Batch]) -> list[tuple[int, tuple[int, ...]]]:
  """(task, the tokens and the last target) of every row that holds some text."""
  return [
    (int(task), (*tokens[mask].tolist(), int(targets[mask][-1])))
    for batch in batches
    for tokens, targets, mask, *_, task in zip(*batch)
    if mask.any()
  ]


# ---- the config


def test_an_entry_is_a_weight_a_source_and_its_argument() -> None:
  config = DataConfig(
    source='mixture',
    synthetic_seed=3,
    mixture=frozendict(
      stdlib=2,
      bible='1 kjv',
      notes=' 0.5  text a b/**/*.md, c.txt ',
      other='5e-1 synthetic',
      one='4 synthetic 07',
    ),
  )
  assert config.tasks == ('bible', 'notes', 'one', 'other', 'stdlib')
  assert [
    (c.task, c.weight, c.config.source, c.config.path, c.config.synthetic_seed)
    for c in config.components
  ] == [
    ('bible', 1 / 8, 'kjv', '', 3),
    ('notes', 1 / 16, 'text', 'a b/**/*.md, c.txt', 3),
    ('one', 1 / 2, 'synthetic', '', 7),
    ('other', 1 / 16, 'synthetic', '', 3),
    ('stdlib', 1 / 4, 'stdlib', '', 3),
  ]
  assert all(
    c.config.mixture == {} and c.config.tokenizer == config.tokenizer for c in config.components
  )


def test_a_plain_source_is_one_task() -> None:
  config = DataConfig(source='kjv')
  assert config.tasks == ('kjv',) and config.components == (('kjv', 1.0, config),)


def test_flags_files_and_hashes_know_mixtures(tmp_path: Path) -> None:
  (tmp_path / 'base.py').write_text(
    'from moejax.config import to_config_dict\nfrom moejax.data.sources import DataConfig\n'
    'def get_config():\n  return to_config_dict(DataConfig())\n'
  )
  argv = [
    '--config.source=mixture',
    '--config.mixture.code=0.7 text a/**/*.py,b/*.py',
    '--config.mixture.kjv=0.3',
  ]
  config = flags.parse_flags(argv, DataConfig, f'{tmp_path}/base.py')
  assert config.mixture == {'code': '0.7 text a/**/*.py,b/*.py', 'kjv': 0.3} and config.tasks == (
    'code',
    'kjv',
  )
  assert flags.parse_flags([argv[0], *argv[:0:-1]], DataConfig, f'{tmp_path}/base.py') == config
  assert from_config_dict(DataConfig, json.loads(to_config_dict(config).to_json())) == config
  assert len({config, from_config_dict(DataConfig, to_config_dict(config)), DataConfig()}) == 2


@pytest.mark.parametrize(
  'table, words',
  [
    ({}, "source='mixture' needs some, as mixture.code='0.7 stdlib'"),
    (
      {'a': '1 stdlb'},
      "mixture.a='1 stdlb': 'stdlb' is not one of ['kjv', 'stdlib', 'synthetic', 'text']; give",
    ),
    ({'a': 1.0}, "mixture.a=1.0: 'a' is not one of ["),
    ({'a': '1 mixture'}, "'mixture' is not one of"),
    ({'a': 'stdlib'}, "mixture.a='stdlib': give 'WEIGHT SOURCE', as '0.7 stdlib'"),
    ({'a': 'stdlib 0.7'}, "give 'WEIGHT SOURCE'"),
    ({'a': ''}, "give 'WEIGHT SOURCE'"),
    ({'a': 'nan kjv'}, "give 'WEIGHT SOURCE'"),
    ({'kjv': 0.0}, 'mixture.kjv=0.0: the weight 0 is to be a number above 0; leave the task out'),
    ({'a': '-1 kjv'}, 'the weight -1 is to be'),
    ({'a': 'inf kjv'}, 'the weight inf is to be'),
    ({'a': '1 text'}, "needs globs, as '1 text ~/notes/**/*.md'"),
    ({'a': '1 synthetic x'}, "'x' is no seed; give a whole number"),
    ({'a': '1 synthetic -1'}, "'-1' is no seed"),
    ({'a': '1 kjv x'}, "source 'kjv' takes nothing after its name; drop 'x'"),
    ({'a/b': '1 kjv'}, "and 'a/b' is none; give another"),
    ({'': '1 kjv'}, "and '' is none; give another"),
    (
      {'b': '1 text x', 'a': '2 text x'},
      "mixture.b='1 text x': mixture.a is the same text; leave one",
    ),
    ({'b': '1 kjv', 'kjv': 2.0}, 'mixture.kjv=2.0: mixture.b is the same text'),
  ],
)
def test_errors_of_entries(table: dict[str, str | float], words: str) -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(source='mixture', mixture=frozendict(table))
  assert len(error.value.problems) == 1 and words in error.value.problems[0]


def test_all_entries_that_are_wrong_are_told_at_once_and_a_mixture_is_not_passed_over() -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(source='mixture', path='x', mixture=frozendict(a='1 kjv', b='0 stdlib', c='x'))
  assert [p.split(':')[0].split('=')[0] for p in error.value.problems] == [
    'path',
    'mixture.b',
    'mixture.c',
  ]
  with pytest.raises(
    ConfigError, match="mixture.a: read by source='mixture' only, not by source='stdlib'"
  ):
    DataConfig(mixture=frozendict(a='1 kjv'))


# ---- a plain source is what it was


def test_a_plain_source_is_the_pipeline_without_a_mixture(folder: Path) -> None:
  config = DataConfig(
    source='text', path=f'{folder}/code/*', tokenizer='bytes', cache_dir=f'{folder}/cache'
  )
  data = open_data(config, batch_size=B, seq_len=S, seed=3)
  streams = [
    np.frombuffer(path.read_bytes()[:-32], np.uint16)
    for path in (folder / 'cache').glob('tokens-*')
  ]
  order = int(digest_of('order', 3)[:8], 16)
  rows = (
    grain.MapDataset.source(Rows(max(streams, key=len), S)).shuffle(seed=order).repeat().batch(B)
  )
  for step in (0, 1, 500):
    assert (
      np.array_equal(data.batch(step).tokens, rows[step][:, :-1])
      and not data.batch(step).task_ids.any()
    )
  assert (
    data.fingerprint['first_batch'] == digest_of(rows[0].tobytes()) and len(data.fingerprint) == 10
  )
  assert data.tasks == config.tasks == ('text',) and 'mixture' not in data.fingerprint


def test_a_mixture_of_one_is_its_source(folder: Path) -> None:
  config = DataConfig(
    source='text', path=f'{folder}/code/*', tokenizer='bpe:300', cache_dir=f'{folder}/cache'
  )
  plain = open_data(config, batch_size=B, seq_len=S, seed=0)
  mixed = _open(folder, {'code': 0.3}, tokenizer='bpe:300')
  assert all(_equal(plain.batch(step), mixed.batch(step)) for step in (0, 1, 40, 10**9))
  assert all(_equal(a, b) for a, b in zip(plain.validation(), mixed.validation(), strict=True))
  assert all(_equal(a, b) for a, b in zip(plain.validation(2), mixed.validation(2), strict=True))
  assert (
    plain.sizes == mixed.sizes
    and plain.bytes_per_token == mixed.bytes_per_token == plain.sizes[0].bytes_per_token
  )
  assert mixed.fingerprint == plain.fingerprint | {'source': 'mixture', 'mixture': 'code=1.0'}
  assert (
    mixed.tasks == ('code',) and len(list((folder / 'cache').iterdir())) == 3
  )  # they share a cache


# ---- training


@pytest.mark.parametrize(
  'weights',
  [
    {'code': 1, 'maths': 1},
    {'code': 0.7, 'maths': 0.2, 'notes': 0.1},
    {'code': 1e-3, 'notes': 0.9, 'maths': 0.5},
    {'code': 3, 'maths': 1 / 3, 'notes': math.pi},
  ],
)
def test_rows_are_drawn_as_the_weights_say(folder: Path, weights: dict[str, float]) -> None:
  data, steps = _open(folder, weights), 300
  tasks = np.array([data.batch(step).task_ids for step in range(steps)])  # [steps, B]
  total = sum(weights.values())
  for i, task in enumerate(data.tasks):
    share = weights[task] / total
    for first in (0, 170):  # over any stretch, not in the end only
      counted = (tasks[first:] == i).sum()
      assert abs(counted - share * tasks[first:].size) <= 2 + 0.01 * share * tasks[first:].size
  assert data.tasks == tuple(sorted(weights)) and tasks.dtype == np.int32


def test_a_row_is_of_the_text_its_task_id_says(folder: Path) -> None:
  data = _open(folder)
  assert data.tasks == ('code', 'maths', 'notes')
  seen = Counter()
  for task, ids in _rows([data.batch(step) for step in range(200)] + list(data.validation())):
    text = bytes(i for i in ids if i != EOD).decode(errors='ignore')
    assert set(text) <= {*LETTERS[data.tasks[task]], '\n'} and text.strip()
    seen[task] += 1
  assert len(seen) == 3


def test_a_batch_is_a_function_of_seed_and_step(folder: Path) -> None:
  data, steps = _open(folder), [0, 1, 2, 63, 10**9]
  forwards = {step: data.batch(step) for step in steps}
  again = _open(folder)
  assert all(
    _equal(again.batch(step), forwards[step]) for step in reversed(steps)
  )  # resume anywhere, in any order
  assert again.fingerprint == data.fingerprint
  other = _open(folder, seed=1)
  assert not np.array_equal(other.batch(0).tokens, forwards[0].tokens)
  assert np.array_equal(
    other.batch(0).task_ids, forwards[0].task_ids
  )  # weights are kept to in any seed
  assert [x.shape for x in forwards[0]] == [(B, S)] * 5 + [(B,)]


def test_each_task_goes_round_its_own_rows_without_end(folder: Path) -> None:
  data = _open(folder, {'code': 5, 'maths': 3, 'notes': 5})
  drawn = _rows(data.batch(step) for step in range(300))
  rounds = []
  for task in range(3):
    rows = [ids for of, ids in drawn if of == task]
    n = data.sizes[task].train_tokens // S
    epochs = [rows[i : i + n] for i in range(0, len(rows) - n, n)]
    assert epochs and all(Counter(epoch) == Counter(epochs[0]) for epoch in epochs)
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    rounds.append(len(epochs))
  assert max(rounds) > 2 * min(rounds), 'the shortest must not end the mixture'


def test_tasks_of_as_many_rows_are_not_shuffled_alike(tmp_path: Path) -> None:
  for task, first in (('a', 100), ('b', 500)):
    (tmp_path / task).mkdir()
    for i in range(200):
      (tmp_path / task / f'{i:03}.txt').write_text(f'{first + i:03}')
  data = _open(tmp_path, {'a': 1, 'b': 1}, batch_size=2, seq_len=4)
  sizes = {size.train_tokens for size in data.sizes}
  first = [
    [ids for of, ids in _rows(data.batch(step) for step in range(20)) if of == task]
    for task in range(2)
  ]
  position = [[int(bytes(i for i in ids if i != EOD)) % 100 for ids in rows] for rows in first]
  assert len(sizes) == 1 and len({abs(a - b) for a, b in zip(*position)}) > 5


# ---- validation


def _streams(batches: Iterable[Batch]) -> dict[int, list[int]]:
  """Task -> its rows' targets, one row after another."""
  found = {task: [] for task in range(3)}
  for batch in batches:
    for targets, mask, task in zip(batch.targets, batch.mask, batch.task_ids):
      found[int(task)] += targets[mask].tolist()
  return found


def test_validation_predicts_every_held_out_token_of_every_task_once(folder: Path) -> None:
  data = _open(folder)
  batches = list(data.validation())
  streams = _streams(batches)
  for i, task in enumerate(data.tasks):
    plain = _plain(folder, task)
    expected = np.concatenate([b.targets[b.mask] for b in plain.validation()]).tolist()
    assert streams[i] == expected and len(expected) == data.sizes[i].validation_tokens
  assert sum(int(b.mask.sum()) for b in batches) == data.validation_tokens
  assert all(b.mask.any(1).all() for b in batches[:-1]) and all(
    b.tokens.shape == (B, S) for b in batches
  )
  for batch in batches:  # -1 and the ids of other rows do not leak into padding
    assert (batch.segment_ids[~batch.mask] == 0).all() and (batch.tokens[~batch.mask] == EOD).all()


@pytest.mark.parametrize('batch_size', [1, 2, 3])
def test_some_of_the_validation_has_every_task(folder: Path, batch_size: int) -> None:
  data = _open(folder, {'code': 5, 'maths': 3, 'notes': 2}, batch_size=batch_size, seq_len=9)
  every = list(data.validation())
  for wanted in range(1, len(every) + 3):
    some = list(data.validation(wanted))
    found = [next(i for i, b in enumerate(every) if _equal(a, b)) for a in some]
    assert len(found) == len(set(found)) == min(wanted, len(every)) and found == sorted(found)
    assert len({int(task) for b in some for task in b.task_ids}) >= min(3, wanted * batch_size)
    if wanted > 3:
      assert found[-1] >= len(every) * (wanted - 2) / wanted - 1  # spread over all of it
  halves = [
    Counter(t for b in half for t in b.task_ids.tolist())
    for half in (every[: len(every) // 2], every[len(every) // 2 :])
  ]
  assert all(
    abs(halves[0][task] - halves[1][task]) <= 0.2 * halves[0][task] + batch_size + 1
    for task in range(3)
  )


def test_one_batch_has_a_task_of_little_text_too(folder: Path) -> None:
  (folder / 'tiny').mkdir()
  (folder / 'tiny' / 'x.txt').write_text('x' * 300)
  data = _open(folder, {'code': 9, 'tiny': 1}, batch_size=2, seq_len=9)
  assert data.sizes[0].validation_tokens > 9 * data.sizes[1].validation_tokens
  assert [batch.task_ids.tolist() for batch in data.validation(1)] == [[0, 1]]


def test_sizes_are_of_each_task_and_add_up(folder: Path) -> None:
  data = _open(folder, {'code': 1, 'maths': 0.5, 'notes': 0.5}, tokenizer='bpe:300')
  for i, task in enumerate(data.tasks):
    of = data.sizes[i]
    total = sum(len(path.read_bytes()) for path in (folder / task).iterdir())
    assert (
      of.train_bytes + of.validation_bytes == total and 0.04 < of.validation_bytes / total < 0.15
    )
    assert of[:4] == tuple(getattr(_of_one(folder, data, task), name) for name in of._fields[:4])
  for name in data.sizes[0]._fields[:4]:
    assert getattr(data, name) == sum(getattr(of, name) for of in data.sizes)
  mixed = (0.5, 0.25, 0.25) @ np.array([of.bytes_per_token for of in data.sizes])
  assert (
    data.bytes_per_token == pytest.approx(mixed)
    and len({of.bytes_per_token for of in data.sizes}) == 3
  )
  texts = data.train_text(), data.validation_text()
  assert [len(text) for text in texts] == [data.train_bytes, data.validation_bytes]
  ids = np.concatenate(
    [data.batch(step).targets.ravel() for step in range(400)]
  )  # as they really are drawn
  lengths = [
    0 if i == data.tokenizer.eod_id else len(data.tokenizer._backend.id_to_token(i))
    for i in range(300)
  ]
  assert data.bytes_per_token == pytest.approx(np.array(lengths)[ids].mean(), rel=2e-3)


def _of_one(folder: Path, data: Data, task: str) -> Data:
  data.tokenizer.save(folder / 'mixed.json')
  config = DataConfig(
    source='text',
    path=f'{folder}/{task}/*',
    tokenizer=f'{folder}/mixed.json',
    cache_dir=f'{folder}/one',
  )
  return open_data(config, batch_size=1, seq_len=S, seed=0)


# ---- held out, of all


def _documents(folder: Path, task: str) -> list[str]:
  return [path.read_text(encoding='utf-8') for path in sorted((folder / task).iterdir())]


def _copy_notes_into_code(folder: Path) -> None:
  for path in sorted((folder / 'notes').iterdir()):
    (folder / 'code' / f'copy{path.name}').write_bytes(path.read_bytes())


def test_a_document_of_two_tasks_is_on_one_side_in_both(folder: Path) -> None:
  _copy_notes_into_code(folder)
  data = _open(folder)
  train, held = (
    text.decode().splitlines(True) for text in (data.train_text(), data.validation_text())
  )
  documents = [text for task in data.tasks for text in _documents(folder, task)]
  assert not set(train) & set(held) and Counter(train + held) == Counter(documents)
  assert {held.count(text) for text in _documents(folder, 'notes')} == {
    0,
    2,
  }  # held out of both, if of one
  assert data.train_bytes + data.validation_bytes == len(''.join(documents).encode())
  assert [of.train_bytes + of.validation_bytes for of in data.sizes] == [
    len(''.join(_documents(folder, task)).encode()) for task in data.tasks
  ]
  rows = {bytes(row) for _, row in _rows(data.batch(step) for step in range(150)) if EOD not in row}
  assert len(rows) > 50 and all(
    row in data.train_text() and row not in data.validation_text() for row in rows
  )


def test_what_others_hold_out_leaves_no_trace_in_the_cache(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  _copy_notes_into_code(folder)
  alone = _open(folder, {'code': 1})
  mixed = _open(folder, {'code': 1, 'notes': 1})
  again = _open(folder, {'code': 1})
  assert alone.fingerprint == again.fingerprint and alone.sizes == again.sizes
  assert mixed.sizes[0].validation_bytes > alone.sizes[0].validation_bytes
  assert mixed.sizes[0].validation_tokens > alone.sizes[0].validation_tokens
  fresh = _open(folder, {'code': 1, 'notes': 1}, cache_dir=f'{folder}/fresh')
  assert fresh.fingerprint == mixed.fingerprint


def test_the_only_document_of_a_task_is_in_no_other(folder: Path) -> None:
  (folder / 'one').mkdir()
  text = 'line of one\n' * 90
  (folder / 'one' / 'x.txt').write_text(text)
  data = _open(folder, {'code': 1, 'one': 1})
  assert (
    data.train_text().count(b'line of one') + data.validation_text().count(b'line of one') == 90
  )
  (folder / 'code' / 'x.txt').write_text(text)
  with pytest.raises(
    ConfigError, match='mixture.code: holds the only document of mixture.one.* leave it out of one'
  ):
    _open(folder, {'code': 1, 'one': 1})
  (folder / 'code' / 'x.txt').unlink()
  held = min(survey_of(sources.text(DataConfig(source='text', path=f'{folder}/code/*'))).held)
  texts = (f'one {i}\n' * 30 for i in itertools.count())
  chosen = next(t for t in texts if blake2b(t.encode(), digest_size=16).hexdigest() < held)
  for task in ('one', 'code'):  # which code holds out by its own choice
    (folder / task / 'x.txt').write_text(chosen)
  with pytest.raises(ConfigError, match='mixture.code: holds the only document of mixture.one'):
    _open(folder, {'code': 1, 'one': 1}, seq_len=4)
  (folder / 'one' / 'x.txt').write_text(text)
  (folder / 'two').mkdir()
  (folder / 'two' / 'x.txt').write_text(text)
  assert _open(folder, {'two': 1, 'one': 1}).sizes[0] == data.sizes[1]  # cut in one place in both


# ---- one tokenizer


def _sampled(folder: Path, weights: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Counter:
  """Task -> bytes of it that the tokenizer learns from."""
  seen = []

  def load(spec: str, documents: Iterable[str]) -> Tokenizer:
    seen.extend(documents)
    return load_tokenizer(spec, seen)

  monkeypatch.setattr(token_stream, 'load_tokenizer', load)
  _open(folder, weights, tokenizer='bpe:260', batch_size=1)
  bytes_of = Counter()
  for text in seen:
    bytes_of[next(task for task, letters in LETTERS.items() if set(text) <= {*letters, '\n'})] += (
      len(text.encode())
    )
  assert all(seen)
  return bytes_of


@pytest.mark.parametrize('sample', [2000, 1 << 22])
@pytest.mark.parametrize(
  'weights',
  [
    {'code': 1, 'maths': 1},
    {'code': 8, 'maths': 1, 'notes': 1},
    {'code': 1, 'maths': 2, 'notes': 7},
  ],
)
def test_the_tokenizer_learns_from_all_as_they_are_weighted(
  folder: Path, weights: dict[str, float], sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', sample)
  found = _sampled(folder, weights, monkeypatch)
  total = sum(found.values())
  assert total <= sample * 1.2 and (total > sample / 2.5 or sample > 10_000)
  for task, weight in weights.items():  # to half a document, and a twentieth
    assert abs(found[task] - total * weight / sum(weights.values())) <= 60 + total / 20, found


def test_a_long_document_does_not_drown_the_others(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', 4000)
  for path in (folder / 'maths').iterdir():
    path.unlink()
  (folder / 'maths' / 'x.txt').write_text('pqrs\n' * 4000)
  found = _sampled(folder, {'code': 3, 'maths': 1}, monkeypatch)
  assert found['maths'] / sum(found.values()) == pytest.approx(1 / 4, rel=0.25), found


def test_the_tokenizer_is_of_the_mixture(folder: Path) -> None:
  tables = ({'code': 1, 'maths': 1}, {'code': 9, 'maths': 1}, {'code': 1, 'notes': 1}, {'code': 1})
  shared = [_open(folder, table, tokenizer='bpe:300', batch_size=1) for table in tables]
  alone = [
    _open(folder, table, tokenizer='bpe:300', batch_size=1, cache_dir=f'{folder}/cache{i}')
    for i, table in enumerate(tables)
  ]
  assert [a.fingerprint for a in shared] == [b.fingerprint for b in alone]
  assert len({data.fingerprint['tokenizer_digest'] for data in shared}) >= 3
  assert all(len(list((folder / f'cache{i}').glob('tokenizer-*'))) == 1 for i in range(4))


# ---- what is kept and what is told


def test_fingerprint_tells_tasks_weights_and_texts(folder: Path) -> None:
  base = _open(folder).fingerprint
  others = [
    _open(folder, {'code': 5, 'maths': 3, 'notes': 2.1}).fingerprint,
    _open(folder, {'code': 5, 'maths': 3}).fingerprint,
    _open(
      folder,
      mixture=frozendict(
        {
          'other': f'5 text {folder}/code/*',
          'maths': f'3 text {folder}/maths/*',
          'notes': f'2 text {folder}/notes/*',
        }
      ),
    ).fingerprint,
  ]
  (folder / 'notes' / '00.txt').write_text('zzz')
  others.append(_open(folder).fingerprint)
  assert len({tuple(f.items()) for f in (base, *others)}) == 5
  for table in (
    {'code': 50, 'maths': 30, 'notes': 20},
    {'code': 0.25, 'maths': 0.15, 'notes': 0.1},
  ):
    assert _open(folder, table).fingerprint == others[-1]  # the same weights
  ratios = [
    {'a': 7, 'b': 2, 'c': 1},
    {'a': 0.7, 'b': 0.2, 'c': 0.1},
    {'a': 2.1, 'b': 0.6, 'c': 0.3},
  ]
  assert [mixture.task_shares(table) for table in ratios] == [ratios[1]] * 3
  assert base['source'] == 'mixture' and base['mixture'] == 'code=0.5 maths=0.3 notes=0.2'
  assert all(type(key) is type(value) is str for key, value in base.items())


def test_a_warm_start_neither_reads_nor_trains(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  before = _open(folder, tokenizer='bpe:300')
  monkeypatch.setattr(sources, '_read_file', None)
  monkeypatch.setattr(token_stream, 'load_tokenizer', None)
  after = _open(folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and _equal(after.batch(3), before.batch(3))


def test_errors_of_texts_name_the_task(folder: Path) -> None:
  def problems(**fields: object) -> str:
    with pytest.raises(ConfigError) as error:
      _open(folder, **fields)
    return str(error.value)

  path = f'1 text {folder}/none*'
  assert f"mixture.notes: path='{folder}/none*' matches no file" in problems(
    mixture=frozendict(notes=path, code=f'1 text {folder}/code/*')
  )
  assert 'mixture.maths: the held-out text has 164 tokens' in problems(seq_len=200, batch_size=1)
  (folder / 'short').mkdir()
  (folder / 'short' / 'a.txt').write_text('hello\n' * 9)
  few, many = (problems(weights={'code': code, 'short': 1}) for code in (1, 0.2))
  assert few.startswith(
    'mixture.short: the held-out text has 4 tokens, less than one row of seq_len=16; give'
  )
  assert (
    ', 3 rows of seq_len=16, but batch_size=6 draws 5 of them; give more text'
    in many.splitlines()[0]
  )


def test_a_batch_is_not_longer_than_a_round(folder: Path) -> None:
  data = _open(folder)
  assert all(size.train_tokens // S >= B for size in data.sizes)
  with pytest.raises(ConfigError, match='batch_size=9999 draws 5000 of them'):
    _open(folder, batch_size=9999)


def test_a_text_that_changes_is_told(folder: Path) -> None:
  data = _open(folder)
  (folder / 'maths' / '07.txt').write_text('other')
  with pytest.raises(ConfigError, match='changed'):
    data.train_text()
