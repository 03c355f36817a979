"""Text to batches, each a pure function of (seed, step).

source -> documents -> split -> tokenizer -> token cache -> rows -> Grain shuffle, repeat, batch -> Batch
A split is one stream: eod document eod document ... The end-of-document token opens a document, so a
document's first token is predicted from eod alone, its last one predicts eod, and every token of the text
is predicted once. Rows are cut from the stream without padding.   B batch  S sequence
"""
import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

from moejax.config import ConfigError, check
from moejax.sources import SOURCES, DataConfig, Source, Survey, digest_of, split, survey_of
from moejax.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger('moejax')

IGNORE = -100                # the target of a position that has nothing to predict
TOKENIZER_SAMPLE = 4 << 20   # bytes that a BPE is trained on: more costs start-up time and moves few merges
GROUP = 4 << 20              # characters tokenised at once: bounds memory
RACY = 2.0                   # seconds within which two writes of a file may bear the same time
FORMAT = 1                   # raise it when what the cache holds for the same text changes
Array = jax.Array | np.ndarray


class Batch(NamedTuple):
  """[B, S] arrays: NumPy as they leave here, JAX inside a step."""
  tokens: Array            # i32
  targets: Array           # i32, IGNORE where there is nothing to predict
  mask: Array              # bool: targets != IGNORE, what the LM loss counts
  segment_ids: Array       # i32, 1.. = documents of the row in order, 0 = padding
  positions: Array         # i32, from 0 in each document and in a row that starts inside one
  task_ids: Array          # [B] i32, 0 unless a mixture says otherwise


@dataclass(frozen=True)
class Rows:
  """A stream cut into rows of S inputs and one target more, for Grain to shuffle; a shorter tail is left."""
  stream: np.ndarray
  seq_len: int

  def __len__(self) -> int:
    return max(len(self.stream) - 1, 0) // self.seq_len

  def __getitem__(self, i: int) -> np.ndarray:  # [S + 1] i32
    return self.stream[i * self.seq_len:(i + 1) * self.seq_len + 1].astype(np.int32)


@dataclass(frozen=True)
class Data:
  """An opened source. Token counts are of tokens predicted, byte counts of the UTF-8 text behind them."""
  tokenizer: Tokenizer
  train_tokens: int          # in one epoch
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float     # of the training text
  fingerprint: dict[str, str]
  _batches: grain.MapDataset
  _validation: np.ndarray
  _shape: tuple[int, int]
  _text: Callable[[bool], bytes]

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def batch(self, step: int) -> Batch:
    """Training batch number `step`, the same whatever was asked before; epochs follow without a seam."""
    return _batch(self._batches[step], self.tokenizer.eod_id)

  def validation(self, max_batches: int = 0) -> Iterator[Batch]:
    """The held-out stream in order, the last batch padded; or `max_batches` of it, evenly spaced."""
    B, S = self._shape
    count = -(-self.validation_tokens // (B * S))
    wanted = min(max_batches, count) or count
    for start in (i * count // wanted * B * S for i in range(wanted)):
      rows = np.full(B * S + 1, -1, np.int32)
      chunk = self._validation[start:start + B * S + 1]
      rows[:len(chunk)] = chunk
      yield _batch(np.lib.stride_tricks.sliding_window_view(rows, S + 1)[::S], self.tokenizer.eod_id)

  def train_text(self) -> bytes:
    """The training text, read anew (a compressor's dictionary); ConfigError when it is another by now."""
    return self._text(False)

  def validation_text(self) -> bytes:
    return self._text(True)


def open_data(cfg: DataConfig, *, batch_size: int, seq_len: int, seed: int) -> Data:
  """Prepares what the cache lacks, seconds the first time, and opens the streams.

  Safe to call from several processes at once. ConfigError for text that is absent, unreadable or too short.
  """
  default = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'moejax'
  cache = (Path(cfg.cache_dir) if cfg.cache_dir else default).expanduser()
  source = SOURCES[cfg.source](cfg)
  survey = _surveyed(cfg, source, cache)
  tokenizer = _tokenizer(cfg.tokenizer, source, survey, cache)
  train, validation = (_stream(source, survey, tokenizer, cache, held_out) for held_out in (False, True))
  rows, held_rows = Rows(train, seq_len), len(Rows(validation, seq_len))
  check('' if len(rows) >= batch_size else
        f'the training text has {len(train)} tokens, {len(rows)} rows of seq_len={seq_len}, but '
        f'batch_size={batch_size}; give more text or lower seq_len or batch_size',
        '' if held_rows else
        f'the held-out text has {len(validation)} tokens, less than one row of seq_len={seq_len}; '
        f'give more text or lower seq_len')
  order = int(digest_of('order', seed)[:8], 16)  # not the seed: Grain adds the epoch, 0 and 1 would overlap
  batches = grain.MapDataset.source(rows).shuffle(seed=order).repeat().batch(batch_size)
  fingerprint = {
    'source': cfg.source, 'source_digest': survey.digest, 'tokenizer': Path(cfg.tokenizer).name,
    'tokenizer_digest': tokenizer.digest, 'train_tokens': str(len(train)),
    'validation_tokens': str(len(validation)), 'batch_size': str(batch_size), 'seq_len': str(seq_len),
    'seed': str(seed), 'first_batch': digest_of(batches[0].tobytes())}  # Grain's order, should it ever change
  return Data(
    tokenizer, len(rows) * seq_len, survey.train_bytes, len(validation) - 1, survey.validation_bytes,
    survey.train_bytes / (len(train) - 1), fingerprint, batches, validation, (batch_size, seq_len),
    lambda held_out: b''.join(text.encode() for text in split(source, survey, held_out)))


def _batch(rows: np.ndarray, eod_id: int) -> Batch:
  """[B, S + 1] ids, -1 past the end of the stream -> Batch."""
  tokens, targets = rows[:, :-1], rows[:, 1:]
  mask = targets >= 0
  opens = (tokens == eod_id) & mask
  index = np.arange(tokens.shape[1], dtype=np.int32)
  segments = np.cumsum(opens, axis=1, dtype=np.int32) + ~opens[:, :1]  # 1 first, also inside a document
  positions = index - np.maximum.accumulate(np.where(opens, index, 0), axis=1)
  return Batch(
    np.where(mask, tokens, eod_id).astype(np.int32), np.where(mask, targets, IGNORE).astype(np.int32), mask,
    np.where(mask, segments, 0).astype(np.int32), np.where(mask, positions, 0).astype(np.int32),
    np.zeros(len(rows), np.int32))


def _cached(path: Path, build: Callable[[], Iterable[bytes]]) -> np.ndarray:
  """The bytes of a cache file, memory-mapped, [n] u8; built where missing, torn or changed by a bit.

  The file ends in a digest of its name and bytes. It gets its name when it is whole, so a reader never sees
  half of it, two builders do each other no harm, and a file that is mapped is never written to.
  """
  try:
    if not _is_whole(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      _write(path, build())
    return np.memmap(path, np.uint8, 'r')[:-32]
  except OSError as error:
    raise ConfigError(f'{error}; set data.cache_dir to a folder with room that can be written to') from error


def _is_whole(path: Path) -> bool:
  if not path.exists():
    return False
  data = np.memmap(path, np.uint8, 'r') if path.stat().st_size else np.zeros(0, np.uint8)
  whole = data[-32:].tobytes() == _seal(path, data[:-32]).digest()
  if not whole:
    logger.warning('%s is damaged: building it anew', path)
  return whole


def _seal(path: Path, data: np.ndarray | bytes) -> 'hashlib.blake2b':
  return hashlib.blake2b(data, digest_size=32, key=path.name[-64:].encode())


def _write(path: Path, chunks: Iterable[bytes]) -> None:
  for stale in path.parent.glob(f'{path.name}.*.tmp'):  # of a process killed in the act
    with contextlib.suppress(FileNotFoundError):
      if time.time() - stale.stat().st_mtime > 3600:
        stale.unlink()
  temporary, seal = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp'), _seal(path, b'')
  try:
    with open(temporary, 'xb') as file:
      for chunk in chunks:
        file.write(chunk)
        seal.update(chunk)
      file.write(seal.digest())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _surveyed(cfg: DataConfig, source: Source, cache: Path) -> Survey:
  """The survey, without reading the text again when nothing about the files has changed."""
  if time.time() - source.changed < RACY:  # as git does: the next write might leave the same stamp
    return survey_of(source)
  path = cache / f'survey-{digest_of(FORMAT, cfg.source, source.stamp)}.json'
  survey = _cached(path, lambda: [json.dumps(survey_of(source)._asdict()).encode()])
  return Survey(**json.loads(bytes(survey)))


def _tokenizer(spec: str, source: Source, survey: Survey, cache: Path) -> Tokenizer:
  if not spec.startswith('bpe:'):
    return load_tokenizer(spec)
  every = -(-survey.train_bytes // TOKENIZER_SAMPLE) or 1  # a sample spread over the whole text

  def train() -> Iterator[bytes]:
    logger.info('training tokenizer %s on %.1f MB', spec, survey.train_bytes / every / 1e6)
    documents = (text for i, text in enumerate(split(source, survey, False)) if i % every == 0)
    yield load_tokenizer(spec, (text[:TOKENIZER_SAMPLE] for text in documents)).json_text.encode()

  path = cache / f'tokenizer-{digest_of(FORMAT, spec, survey.digest)}.json'
  return Tokenizer(bytes(_cached(path, train)).decode(), spec)


def _stream(source: Source, survey: Survey, tokenizer: Tokenizer, cache: Path, held_out: bool) -> np.ndarray:
  """eod document eod document ..., [n] uint16 or uint32, memory-mapped."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  eod = dtype.type(tokenizer.eod_id).tobytes()

  def build() -> Iterator[bytes]:
    logger.info('tokenising %.1f MB', (survey.validation_bytes if held_out else survey.train_bytes) / 1e6)
    for group in _groups(split(source, survey, held_out), tokenizer):
      for (opens, _), ids in zip(group, tokenizer.encode_batch([piece for _, piece in group])):
        if ids.size and (ids.max() >= tokenizer.vocab_size or (ids == tokenizer.eod_id).any()):
          raise ConfigError(f'tokenizer={tokenizer.name!r} turns text into its end of document (id '
                            f'{tokenizer.eod_id}) or ids above its {tokenizer.vocab_size}; take another')
        yield (eod if opens else b'') + ids.astype(dtype).tobytes()

  name = digest_of(FORMAT, survey.digest, tokenizer.digest, held_out)
  return _cached(cache / f'tokens-{name}.{dtype.name}', build).view(dtype)


def _groups(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[tuple[bool, str]]]:
  """Pieces of documents, each with whether it opens one, about GROUP characters at a time."""
  group, size = [], 0
  for text in texts:
    for i, piece in enumerate(tokenizer.pieces(text)):
      group.append((i == 0, piece))
      size += len(piece)
      if size >= GROUP:
        yield group
        group, size = [], 0
  yield group
