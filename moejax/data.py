"""Text to batches, each a pure function of (seed, step).

source -> documents -> split -> tokenizer -> token cache -> rows -> Grain shuffle, repeat, mix, batch -> Batch
A split is one stream: eod document eod document ... The end-of-document token opens a document, so a
document's first token is predicted from eod alone, its last one predicts eod, and every token of the text
is predicted once. Rows are cut from the stream without padding. A mixture has a pair of streams for each task, all
cut by one tokenizer; a row is of one task, a batch of several.   B batch  S sequence  T tasks
"""
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np

from moejax.cache import cached
from moejax.config import ConfigError, check
from moejax.heldout import Survey, digest_of, split, survey_of
from moejax.sources import SOURCES, Component, DataConfig, Source
from moejax.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger('moejax')

IGNORE = -100                # the target of a position that has nothing to predict
TOKENIZER_SAMPLE = 4 << 20   # bytes that a BPE is trained on: more costs start-up time and moves few merges
GROUP = 4 << 20              # characters tokenised at once: bounds memory
RACY = 2.0                   # seconds within which two writes of a file may bear the same time
FORMAT = 2                   # raise it when what the cache holds for the same text changes
Array = jax.Array | np.ndarray


class Batch(NamedTuple):
  """[B, S] arrays: NumPy as they leave here, JAX inside a step."""
  tokens: Array            # i32
  targets: Array           # i32, IGNORE where there is nothing to predict
  mask: Array              # bool: targets != IGNORE, what the LM loss counts
  segment_ids: Array       # i32, 1.. = documents of the row in order, 0 = padding
  positions: Array         # i32, from 0 in each document and in a row that starts inside one
  task_ids: Array          # [B] i32: the row is of Data.tasks[i]


@dataclass(frozen=True)
class Rows:
  """A stream cut into rows of S inputs and one target more, for Grain to shuffle; a shorter tail is left."""
  stream: np.ndarray
  seq_len: int

  def __len__(self) -> int:
    return max(len(self.stream) - 1, 0) // self.seq_len

  def __getitem__(self, i: int) -> np.ndarray:  # [S + 1] i32
    return self.stream[i * self.seq_len:(i + 1) * self.seq_len + 1].astype(np.int32)


class Size(NamedTuple):
  """How much text: counts of tokens predicted, and of the UTF-8 bytes behind them."""
  train_tokens: int          # in one epoch
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float     # of the training text


class Text(NamedTuple):
  """The text of a task, read once."""
  component: Component
  source: Source
  survey: Survey


@dataclass(frozen=True)
class Data:
  """An opened source, or mixture. Counts are of all tasks together; `sizes` has those of each."""
  tokenizer: Tokenizer
  tasks: tuple[str, ...]     # as DataConfig.tasks
  sizes: tuple[Size, ...]    # of each task
  train_tokens: int          # in one epoch of each
  train_bytes: int
  validation_tokens: int
  validation_bytes: int
  bytes_per_token: float     # of the training text, as it is mixed
  fingerprint: dict[str, str]
  _rows: grain.MapDataset
  _validation: tuple[np.ndarray, ...]
  _shape: tuple[int, int]
  _text: Callable[[bool], bytes]

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  def batch(self, step: int, rows: Sequence[int] = ()) -> Batch:
    """Training batch number `step`, or rows of it, the same whatever was asked before; epochs follow without a seam."""
    B = self._shape[0]
    return _batch(*map(np.stack, zip(*(self._rows[step * B + row] for row in rows or range(B)))), self.tokenizer.eod_id)

  def validation(self, max_batches: int = 0, rows: Sequence[int] = ()) -> Iterator[Batch]:
    """The held-out streams, each in order, the last row of each and the last batch padded; or `max_batches` of it,
    evenly spaced. The streams are interleaved to end together. The batches in which they open are always among those
    asked for, so that every task is seen, if only as many rows are asked for as there are tasks. `rows` as `batch`."""
    B, S = self._shape
    counts = np.array([-(-size.validation_tokens // S) for size in self.sizes])  # [T] rows
    tasks, places = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])
    order = np.lexsort((tasks, places / counts[tasks]))
    count, opening = -(-len(order) // B), (len(counts) - 1) // B
    wanted = min(max_batches, count) or count
    for i in range(wanted):
      at = i if i < opening else opening + (i - opening) * (count - opening) // (wanted - opening)
      mine = [at * B + row for row in rows or range(B)]
      ids, task_ids = np.full((len(mine), S + 1), -1, np.int32), np.zeros(len(mine), np.int32)
      for row, chosen in enumerate(order[[place for place in mine if place < len(order)]]):
        task_ids[row], n = tasks[chosen], places[chosen]
        chunk = self._validation[tasks[chosen]][n * S:(n + 1) * S + 1]
        ids[row, :len(chunk)] = chunk
      yield _batch(ids, task_ids, self.tokenizer.eod_id)

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
  texts = _texts(cfg, cache)
  tokenizer = _tokenizer(cfg.tokenizer, texts, cache)
  streams, datasets, sizes = [], [], []
  for task, text in enumerate(texts):
    with _naming(cfg, text.component):
      train, validation = (_stream(text, tokenizer, cache, held_out) for held_out in (False, True))
      rows, survey = Rows(train, seq_len), text.survey
      _check_lengths(rows, Rows(validation, seq_len), batch_size, text.component.weight)
    order = ('order', seed) if task == 0 else ('order', seed, task)
    order = int(digest_of(*order)[:8], 16)  # not the seed: Grain adds the epoch, 0 and 1 would overlap
    datasets.append(grain.MapDataset.source(rows).shuffle(seed=order).repeat().map(_labelled(task)))
    streams.append((train, validation))
    sizes.append(Size(len(rows) * seq_len, survey.train_bytes, len(validation) - 1, survey.validation_bytes,
                      survey.train_bytes / (len(train) - 1)))
  weights = [component.weight for component, _, _ in texts]
  mixed = grain.MapDataset.mix(datasets, weights)  # cuts weights to 1% of the least
  fingerprint = {  # its first batch: Grain's order, should it ever change
    'source': cfg.source, 'source_digest': _digest(texts), 'tokenizer': Path(cfg.tokenizer).name, 'seed': str(seed),
    'tokenizer_digest': tokenizer.digest, 'train_tokens': str(sum(len(train) for train, _ in streams)),
    'validation_tokens': str(sum(len(validation) for _, validation in streams)), 'batch_size': str(batch_size),
    'seq_len': str(seq_len), 'first_batch': digest_of(b''.join(mixed[i][0] for i in range(batch_size)))}
  if cfg.mixture:
    fingerprint['mixture'] = ' '.join(f'{component.task}={component.weight}' for component, _, _ in texts)
  return Data(
    tokenizer, cfg.tasks, tuple(sizes), *(sum(counts) for counts in list(zip(*sizes))[:4]),
    sum(weight * size.bytes_per_token for weight, size in zip(weights, sizes)), fingerprint, mixed,
    tuple(validation for _, validation in streams), (batch_size, seq_len),
    lambda held_out: b''.join(text.encode() for _, *of in texts for text in split(*of, held_out)))


def _texts(cfg: DataConfig, cache: Path) -> list[Text]:
  """Surveys every task's source; what one holds out, all hold out."""
  texts = []
  for component in cfg.components:
    with _naming(cfg, component):
      source = SOURCES[component.config.source](component.config)
      texts.append(Text(component, source, _surveyed(component.config, source, cache, ())))
  if len(texts) == 1:
    return texts
  lone = {text.survey.lone: text.component.task for text in texts if text.survey.lone}
  held = sorted({*lone, *(key for text in texts for key in text.survey.held)})
  texts = [Text(of, source, _surveyed(of.config, source, cache, held)) for of, source, _ in texts]
  check(*(f'mixture.{text.component.task}: holds the only document of mixture.{lone[key]}, which trains on most of '
          'it; leave it out of one of the two' for text in texts for key in text.survey.held if key in lone))
  return texts


@contextlib.contextmanager
def _naming(cfg: DataConfig, component: Component) -> Iterator[None]:
  """Tells of a mixture's problems which task they are of."""
  try:
    yield
  except ConfigError as error:
    where = f'mixture.{component.task}: ' if cfg.mixture else ''
    raise ConfigError(*(where + problem for problem in error.problems)) from error


def _check_lengths(train: Rows, held: Rows, batch_size: int, weight: float) -> None:
  """A batch does not draw a row twice, and there is something to validate on."""
  drawn, seq_len = math.ceil(batch_size * weight), train.seq_len
  share = f' draws {drawn} of them' if drawn < batch_size else ''
  check('' if len(train) >= drawn else
        f'the training text has {len(train.stream)} tokens, {len(train)} rows of seq_len={seq_len}, but '
        f'batch_size={batch_size}{share}; give more text or lower seq_len or batch_size',
        '' if len(held) else
        f'the held-out text has {len(held.stream)} tokens, less than one row of seq_len={seq_len}; '
        f'give more text or lower seq_len')


def _labelled(task: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.int32]]:
  return lambda row: (row, np.int32(task))


def _digest(texts: list[Text]) -> str:
  """Of what is read and how it is mixed; a source alone has its own."""
  if len(texts) == 1:
    return texts[0].survey.digest
  return digest_of([(text.survey.digest, text.component.weight) for text in texts])


def _batch(rows: np.ndarray, task_ids: np.ndarray, eod_id: int) -> Batch:
  """[B, S + 1] ids, -1 past the end of the stream, and [B] tasks -> Batch."""
  tokens, targets = rows[:, :-1], rows[:, 1:]
  mask = targets >= 0
  opens = (tokens == eod_id) & mask
  index = np.arange(tokens.shape[1], dtype=np.int32)
  segments = np.cumsum(opens, axis=1, dtype=np.int32) + ~opens[:, :1]  # 1 first, also inside a document
  positions = index - np.maximum.accumulate(np.where(opens, index, 0), axis=1)
  return Batch(
    np.where(mask, tokens, eod_id).astype(np.int32), np.where(mask, targets, IGNORE).astype(np.int32), mask,
    np.where(mask, segments, 0).astype(np.int32), np.where(mask, positions, 0).astype(np.int32),
    task_ids)


def _surveyed(cfg: DataConfig, source: Source, cache: Path, elsewhere: list[str]) -> Survey:
  """The survey, without reading the text again when nothing about the files has changed."""
  if time.time() - source.changed < RACY:  # as git does: the next write might leave the same stamp
    return survey_of(source, set(elsewhere))
  path = cache / f'survey-{digest_of(FORMAT, cfg.source, source.stamp, digest_of(elsewhere))}.json'
  survey = cached(path, lambda: [json.dumps(survey_of(source, set(elsewhere))._asdict()).encode()])
  return Survey(**json.loads(bytes(survey)))


def _tokenizer(spec: str, texts: list[Text], cache: Path) -> Tokenizer:
  if not spec.startswith('bpe:'):
    return load_tokenizer(spec)
  path = cache / f'tokenizer-{digest_of(FORMAT, spec, _digest(texts))}.json'
  json_text = cached(path, lambda: [load_tokenizer(spec, _sample(texts)).json_text.encode()])
  return Tokenizer(bytes(json_text).decode(), spec)


def _sample(texts: list[Text]) -> Iterator[str]:
  """Documents spread over the whole training text; of a mixture, as many bytes of each task as its weight says.

  Every n-th of the task with most text for its weight; of the others more, of a short one copies, as in training.
  """
  supply = max(Fraction(text.survey.train_bytes) / Fraction(text.component.weight) for text in texts)
  total = supply / (math.ceil(supply / TOKENIZER_SAMPLE) or 1)
  logger.info('training a tokenizer on %.1f MB', total / 1e6)
  for component, source, survey in texts:
    share = Fraction(component.weight) * total
    copies, of = (share / (survey.train_bytes or 1)).as_integer_ratio()  # so many in each run of so many documents
    left = int(share)
    for i, text in enumerate(split(source, survey, False)):
      for _ in range((-i * copies // of) - (-(i + 1) * copies // of)):  # what ceil(i * copies / of) grows by
        if len(texts) == 1 or left > 0:
          yield text[:TOKENIZER_SAMPLE if len(texts) == 1 else left]
          left -= len(text.encode())


def _stream(text: Text, tokenizer: Tokenizer, cache: Path, held_out: bool) -> np.ndarray:
  """eod document eod document ..., [n] uint16 or uint32, memory-mapped."""
  _, source, survey = text
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

  name = digest_of(FORMAT, survey.digest, tokenizer.digest, held_out, *survey.shared)
  return cached(cache / f'tokens-{name}.{dtype.name}', build).view(dtype)


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
