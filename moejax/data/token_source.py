"""A text that comes as token ids: checked against its tokenizer, and cut in two.

files -> ids -> scanned once -> training and held-out part, memory-mapped
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError, check, problem_if
from moejax.data.formats import files_of_path
from moejax.data.holdout import HELD_OUT, Survey, digest_of
from moejax.data.rows import document_openings
from moejax.data.token_cache import open_cached
from moejax.data.token_files import TOKEN_FORMATS, IdRange, Ids, Joined
from moejax.data.tokenizer import Tokenizer

logger = logging.getLogger('moejax')

CHUNK = 1 << 22  # ids that are looked at at once
MOST_HELD_OUT = 1 << 24  # ids: more would make a validation hours long, and no better
MOST_AS_TEXT = 1 << 23  # ids whose text is wanted for a compressor
HELD_OUT_NAMES = 'val'  # how the names of files that are held out begin, as nanoGPT has them
FORMAT = 1  # raise it when what a scan tells changes


class Scan(NamedTuple):
  """What is learnt of a file of ids by reading it once. The cache has it by these names."""

  digest: str  # of the ids
  text_bytes: int  # UTF-8 bytes of the text behind the ids
  documents: int  # ends of documents


class TokenText(NamedTuple):
  """Both sides of a text that comes as ids."""

  train: Ids
  validation: Ids
  survey: Survey
  tokenizer: Tokenizer

  def text_of_side(self, held_out: bool) -> list[str]:
    """Returns the text behind the last ids of one side, at most MOST_AS_TEXT of them."""
    ids = self.validation if held_out else self.train
    return [self.tokenizer.decode(ids[max(len(ids) - MOST_AS_TEXT, 0) : len(ids)].tolist())]


def open_tokens(path: str, dtype: str, tokenizer: Tokenizer, cache: Path) -> TokenText:
  """Opens files of ids; each is read through once, and then known by its size and times.

  Files whose names begin with val are held out. Where there are none, the end of the last file is,
  5% of all and at most MOST_HELD_OUT ids, from the beginning of a document on.

  Args:
    path: globs and folders, with commas between.
    dtype: of flat files and of records.
    tokenizer: which made the ids.
    cache: the folder of the cache.

  Raises:
    ConfigError: a file cannot be read, or holds ids that the tokenizer does not have.
  """
  paths = files_of_path(path, can_read=suffix_of_tokens, kinds=' '.join(TOKEN_FORMATS))
  files = {name: TOKEN_FORMATS[suffix_of_tokens(name)](name, np.dtype(dtype)) for name in paths}
  scans = {name: _cached_scan(name, ids, tokenizer, cache) for name, ids in files.items()}
  if not any(scan.documents for scan in scans.values()):
    logger.warning(
      '%s holds no end of document, id %d of %s: attention runs over all that it holds',
      path,
      tokenizer.eod_id,
      tokenizer.name,
    )
  validation_names = [name for name in paths if Path(name).name.startswith(HELD_OUT_NAMES)]
  train = Joined([files[name] for name in paths if name not in validation_names])
  text_bytes = sum(scan.text_bytes for scan in scans.values())
  if validation_names:
    validation = Joined([files[name] for name in validation_names])
  else:
    cut = _document_start(train, len(train) - _num_held_out(len(train)), tokenizer.eod_id)
    train, validation = IdRange(train, 0, cut), IdRange(train, cut, len(train))
  sizes = _document_sizes(validation[0 : len(validation)], tokenizer)
  check(problem_if(len(train) < 2, f'path={path!r} holds no ids to train on; give more files'))
  survey = Survey(
    digest=digest_of([scan.digest for scan in scans.values()], len(train), len(validation)),
    held=[],
    lone='',
    lone_copies=[],
    has_near_copies=False,
    train_bytes=text_bytes - sum(sizes),
    validation_bytes=sum(sizes),
    validation_sizes=sizes,
    validation_groups=list(range(len(sizes))),
  )
  return TokenText(train, validation, survey, tokenizer)


def suffix_of_tokens(path: str) -> str:
  """Returns the row of TOKEN_FORMATS that opens the file, '' where none does."""
  suffix = os.path.splitext(path)[1]
  return suffix if suffix in TOKEN_FORMATS else ''


def _num_held_out(num_ids: int) -> int:
  return min(int(HELD_OUT * num_ids), MOST_HELD_OUT)


def _document_sizes(ids: np.ndarray, tokenizer: Tokenizer) -> list[int]:
  """Returns the UTF-8 bytes of each document of a stream [n]."""
  if not len(ids):
    return []
  openings = document_openings(ids, tokenizer.eod_id, bool(tokenizer.closing))
  return np.add.reduceat(tokenizer.bytes_of_ids()[ids], openings).tolist()


def _document_start(ids: Ids, place: int, eod_id: int) -> int:
  """Returns where the document starts that is at a place; the place itself where that is far."""
  start = max(place - CHUNK, 0)
  ends = np.flatnonzero(ids[start : place + 1] == eod_id)
  return start + int(ends[-1]) if len(ends) else place


def _cached_scan(path: str, ids: Ids, tokenizer: Tokenizer, cache: Path) -> Scan:
  """Returns the scan of a file, which is read only where something about the file has changed."""
  status = os.stat(path)
  times = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
  name = digest_of(FORMAT, path, times, str(ids[0:1].dtype), tokenizer.digest)
  scan = open_cached(
    cache / f'scan-{name}.json',
    lambda: [json.dumps(_scan(ids, tokenizer, path)._asdict()).encode()],
  )
  return Scan(**json.loads(bytes(scan)))


def _scan(ids: Ids, tokenizer: Tokenizer, path: str) -> Scan:
  """Reads all ids.

  Raises:
    ConfigError: an id is none of the tokenizer: JAX would clamp it without an error.
  """
  counts = np.zeros(tokenizer.vocab_size, np.int64)  # [V] how often each id comes
  digest = hashlib.blake2b(digest_size=16)
  if len(ids) > 16 * CHUNK:
    logger.info('checking the %.3g ids of %s, once', len(ids), path)
  for place, chunk in _chunks(ids):
    wrong = chunk[(chunk < 0) | (chunk >= tokenizer.vocab_size)]
    if len(wrong):
      raise ConfigError(
        f'{path}: id {wrong[0]} after {place} ids is none of the {tokenizer.vocab_size} of '
        f'tokenizer={tokenizer.name!r}; name the tokenizer that made them, or another '
        f'data.token_dtype than {chunk.dtype}'
      )
    counts += np.bincount(chunk, minlength=len(counts))
    digest.update(np.ascontiguousarray(chunk))
  text_bytes = int(counts @ tokenizer.bytes_of_ids())
  return Scan(digest.hexdigest(), text_bytes, int(counts[tokenizer.eod_id]))


def _chunks(ids: Ids) -> Iterator[tuple[int, np.ndarray]]:
  """Yields a place and the ids from there on, CHUNK at a time."""
  for place in range(0, len(ids), CHUNK):
    yield place, np.asarray(ids[place : place + CHUNK])
