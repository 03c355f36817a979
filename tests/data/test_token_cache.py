"""The cache: damage is built anew, no change of a text goes unseen, and many may use it."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moejax.config import ConfigError
from moejax.data import sources, token_cache, token_stream
from moejax.data.sources import SOURCES, DataConfig
from moejax.data.token_cache import open_cached
from tests.data.mixed_texts import equal
from tests.data.plain_texts import open_text


def fail(*args: object, **kwargs: object) -> None:
  raise TypeError('called')


def cut(content: bytes) -> bytes:
  return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
  return content[:40] + bytes([content[40] ^ 4]) + content[41:]


@pytest.mark.parametrize(
  'damage',
  [
    cut,
    flip,
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
  before = open_text(folder, tokenizer='bpe:300')
  files = [path for path in (folder / 'cache').iterdir() if path.name.startswith(kind)]
  contents = [path.read_bytes() for path in files]
  assert files
  for path, content in zip(files, contents):
    path.unlink()  # the first opening still maps it
    path.write_bytes(damage(content))
  after = open_text(folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and equal(after.batch(7), before.batch(7))
  assert [path.read_bytes() for path in files] == contents


def test_a_cache_file_under_another_name_is_not_believed(folder: Path) -> None:
  before = open_text(folder)
  a, b = [path for path in (folder / 'cache').iterdir() if path.name.startswith('tokens')]
  a.rename(folder / 'c')
  b.rename(a)
  (folder / 'c').rename(b)
  assert equal(open_text(folder).batch(0), before.batch(0))


def test_a_whole_file_is_digested_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  path = tmp_path / 'tokens'
  assert bytes(open_cached(path, lambda: [b'ab', b'c'])) == b'abc'
  digested = []
  seal_of = token_cache._seal_of
  monkeypatch.setattr(
    token_cache, '_seal_of', lambda path, content: digested.append(path) or seal_of(path, content)
  )
  assert bytes(open_cached(path, fail)) == b'abc' and not digested
  (tmp_path / 'other').write_bytes(path.read_bytes())
  (tmp_path / 'other').replace(path)  # the same bytes in another file
  assert bytes(open_cached(path, fail)) == b'abc' and digested == [path]
  assert bytes(open_cached(path, fail)) == b'abc' and digested == [path]
  times = path.stat()
  with open(path, 'r+b') as file:
    file.write(b'x')
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  assert bytes(open_cached(path, lambda: [b'abc'])) == b'abc' and len(digested) > 1
  assert path.read_bytes()[:3] == b'abc'


def test_one_cache_for_many(folder: Path) -> None:
  cases = [
    {'tokenizer': tokenizer, 'path': f'{folder}/text/{names}'}
    for tokenizer in ('bytes', 'bpe:300', 'bpe:310')
    for names in ('[0-3]*', '[1-5]*')
  ]
  shared = [open_text(folder, **case) for case in cases]
  alone = [
    open_text(folder, **case, cache_dir=f'{folder}/cache{i}') for i, case in enumerate(cases)
  ]
  assert all(equal(a.batch(1), b.batch(1)) for a, b in zip(shared, alone, strict=True))
  assert [a.fingerprint for a in shared] == [b.fingerprint for b in alone]


def test_a_warm_start_neither_reads_nor_trains(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', 0)
  before = open_text(folder, tokenizer='bpe:300')
  monkeypatch.setattr(sources, 'read_documents', fail)
  monkeypatch.setattr(token_stream, 'load_tokenizer', None)
  after = open_text(folder, tokenizer='bpe:300')
  assert after.fingerprint == before.fingerprint and after.tokenizer.decode(
    after.batch(0).tokens[0]
  )
  monkeypatch.setattr(token_stream, 'RACY', 60)  # files this young are read again all the same
  with pytest.raises(TypeError):
    open_text(folder, tokenizer='bpe:300')


@pytest.mark.parametrize('wait, racy', [(0.05, 0.0), (0.0, 2.0)])  # by its stamp; by its youth
def test_a_changed_source_is_noticed(
  folder: Path, wait: float, racy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(token_stream, 'RACY', racy)
  for path in (folder / 'text').iterdir():
    os.utime(path, (1, 1))
  path = max((folder / 'text').iterdir(), key=os.path.getsize)
  before, times = open_text(folder), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
  assert (
    time.time() - SOURCES['text'](DataConfig(source='text', path=f'{folder}/text/*')).changed < 60
  )
  time.sleep(wait)
  path.write_bytes(path.read_bytes().replace(b'alpha', b'omega'))
  os.utime(path, ns=times)  # size and modification time as before
  after = open_text(folder)
  assert after.fingerprint['source_digest'] != before.fingerprint['source_digest']
  assert b'omega' in after.train_text() + after.validation_text()
  with pytest.raises(ConfigError, match='changed'):
    before.train_text()


def test_four_at_once(folder: Path) -> None:
  with ThreadPoolExecutor(4) as pool:
    opened = list(pool.map(lambda _: open_text(folder, tokenizer='bpe:300'), range(4)))
  assert all(data.fingerprint == opened[0].fingerprint for data in opened)
  assert not list((folder / 'cache').glob('*.tmp'))


def test_what_a_killed_writer_left_is_removed_once_it_is_old(folder: Path) -> None:
  open_text(folder)
  tokens, *_ = (folder / 'cache').glob('tokens-*')
  tokens.unlink()
  mine, old, young = (tokens.with_name(f'{tokens.name}.{x}.tmp') for x in 'abc')
  notes = folder / 'cache' / 'notes.tmp'
  for path in (mine, old, young, notes):
    path.write_text('half')
  for path in (mine, old, notes):
    os.utime(path, (1, 1))
  open_text(folder)
  assert [path.exists() for path in (mine, old, young, notes)] == [False, False, True, True]


def test_cache_is_where_the_system_keeps_caches(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('XDG_CACHE_HOME', f'{folder}/xdg')
  open_text(folder, cache_dir='')
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', f'{folder}/home')
  open_text(folder, cache_dir='')
  assert list(folder.glob('xdg/moejax/tokens-*')) and list(
    folder.glob('home/.cache/moejax/tokens-*')
  )
