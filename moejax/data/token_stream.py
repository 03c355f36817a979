"""From a source's text to its streams of token ids, cached on disk: survey, tokenizer, tokens."""

import collections
import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from moejax.config import ConfigError, check
from moejax.data.document_marks import tell_marks
from moejax.data.encoding import bytes_of_group, id_dtype, piece_groups
from moejax.data.encoding_workers import encode_groups, num_workers
from moejax.data.holdout import Reading, Survey, digest_of, documents_of_split, read_source
from moejax.data.progress import telling_progress
from moejax.data.sources import SOURCES, TOKENS, Component, DataConfig, Source
from moejax.data.special_tokens import OWN, SpecialTokens
from moejax.data.split import surveys_of
from moejax.data.token_cache import open_cached
from moejax.data.token_files import Ids
from moejax.data.token_source import TokenText, open_tokens
from moejax.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger('moejax')

# Bytes that a BPE is trained on: more would cost start-up time and move few merges.
TOKENIZER_SAMPLE = 4 << 20
TEXT_IN_MEMORY = 1 << 28  # bytes of a side that `read_side` returns, from the end
RACY = 2.0  # seconds within which two writes of a file may bear the same time
FORMAT = 4  # raise it when what the cache holds for the same text changes


class Text(NamedTuple):
  """The text of a task, read once."""

  component: Component
  source: Source | TokenText
  survey: Survey


def survey_texts(cfg: DataConfig, cache: Path, special: SpecialTokens = OWN) -> list[Text]:
  """Surveys the source of every task, in the order of task ids; what one holds out, all hold out.

  The text is read only where something about the files has changed.

  Raises:
    ConfigError: a text cannot be read, or a task trains on the only document of another, of which
      the end is held out.
  """
  sources = []
  for component in cfg.components:
    with name_task_in_errors(cfg, component):
      sources.append(_open_source(component.config, cache, special))
  surveys = iter(_survey_together(cfg, sources, cache))
  texts = []
  for component, source in zip(cfg.components, sources):
    # Documents of ids are not compared with those of others.
    survey = source.survey if isinstance(source, TokenText) else next(surveys)
    texts.append(Text(component, source, survey))
  lone_tasks = {text.survey.lone: text.component.task for text in texts}
  check(*(problem for text in texts for problem in _lone_document_problems(text, lone_tasks)))
  for text in texts:
    if text.survey.has_near_copies:
      logger.warning(
        '%s: too few documents without near-copies to hold out: what trains has near-copies of '
        'what is held out, and bits per byte will flatter',
        text.component.task,
      )
  return texts


def _open_source(cfg: DataConfig, cache: Path, special: SpecialTokens) -> Source | TokenText:
  if cfg.source == TOKENS:
    tokenizer = load_tokenizer(cfg.tokenizer, special=special)
    return open_tokens(cfg.path, cfg.token_dtype, tokenizer, cache)
  return SOURCES[cfg.source](cfg)


def _survey_together(
  cfg: DataConfig, sources: Sequence[Source | TokenText], cache: Path
) -> list[Survey]:
  """Returns the surveys of those sources that are read as text, in order."""
  read = [
    (component, source)
    for component, source in zip(cfg.components, sources)
    if not isinstance(source, TokenText)
  ]
  if not read:
    return []

  def build() -> bytes:
    readings = []
    for component, source in read:
      with name_task_in_errors(cfg, component):
        readings.append(read_source(_telling_marks(source)))
        _tell_unused_separator(component.config.separator, source.text_files, readings[-1])
    return json.dumps([survey._asdict() for survey in surveys_of(readings)]).encode()

  changed = max(source.changed for _, source in read)
  if time.time() - changed < RACY:  # as git does: the next write might leave the same stamp
    json_text = build()
  else:
    stamps = [(component.config.source, source.stamp) for component, source in read]
    path = cache / f'survey-{digest_of(FORMAT, stamps)}.json'
    json_text = bytes(open_cached(path, lambda: [build()]))
  return [Survey(**fields) for fields in json.loads(json_text)]


def _tell_unused_separator(separator: str, text_files: int, reading: Reading) -> None:
  """Logs that data.separator has cut no document.

  text_files: as of the source.
  """
  documents = 1 if reading.lone else len(reading.order)
  if documents <= text_files:
    logger.warning(
      'data.separator=%r has cut no document: each file is one; a line break in it is written '
      "--config.data.separator=$'\\n' in a shell",
      separator,
    )


def _telling_marks(source: Source) -> Source:
  """Returns the source, which logs separators of documents that it meets."""
  documents = source.documents
  return source._replace(documents=lambda: tell_marks(documents()))


def _lone_document_problems(text: Text, lone_tasks: dict[str, str]) -> list[str]:
  """Returns a problem for each other task whose only document is in this text, or a near-copy.

  lone_tasks: digest of an only document -> its task.
  """
  return [
    f'mixture.{text.component.task}: holds the only document of mixture.{lone_tasks[digest]}, or a '
    'near-copy; that task trains on most of it; leave it out of one of the two'
    for digest in text.survey.lone_copies
  ]


@contextlib.contextmanager
def name_task_in_errors(cfg: DataConfig, component: Component) -> Iterator[None]:
  """In the block, puts the task of a mixture in front of each problem of a ConfigError."""
  try:
    yield
  except ConfigError as error:
    where = f'mixture.{component.task}: ' if cfg.mixture else ''
    raise ConfigError(*(where + problem for problem in error.problems)) from error


def digest_of_texts(texts: Sequence[Text]) -> str:
  """Returns a digest of what is read and how it is mixed; of a source alone, that of its survey."""
  if len(texts) == 1:
    return texts[0].survey.digest
  return digest_of([(text.survey.digest, text.component.weight) for text in texts])


def digest_of_split(texts: Sequence[Text]) -> str:
  """Returns a digest of which documents are held out."""
  return digest_of([text.survey.held for text in texts])


def open_tokenizer(
  spec: str, texts: Sequence[Text], cache: Path, special: SpecialTokens
) -> Tokenizer:
  """Returns the tokenizer that `spec` names; a BPE that is not in the cache is trained first.

  special: of the model that the text is for.
  """
  if not spec.startswith('bpe:'):
    return load_tokenizer(spec, special=special)
  path = cache / f'tokenizer-{digest_of(FORMAT, spec, digest_of_texts(texts))}.json'
  json_text = open_cached(path, lambda: [load_tokenizer(spec, _sample(texts)).json_text.encode()])
  return Tokenizer(bytes(json_text).decode(), spec, special)


def _sample(texts: Sequence[Text]) -> Iterator[str]:
  """Yields documents spread over the whole training text, for a tokenizer to learn from.

  Of a mixture, as many bytes of each task as its weight says: every n-th document of the task with
  most text for its weight; of the others more, of a short one copies, as in training.
  """
  is_mixture = len(texts) > 1
  # In fractions, so that which documents are taken does not hang on rounding.
  supply = max(
    Fraction(text.survey.train_bytes) / Fraction(text.component.weight) for text in texts
  )
  total = supply / (math.ceil(supply / TOKENIZER_SAMPLE) or 1)
  logger.info('training a tokenizer on %.1f MB', total / 1e6)
  for component, source, survey in texts:
    share = Fraction(component.weight) * total  # bytes
    copies = share / (survey.train_bytes or 1)  # of each document, on average
    bytes_left = int(share)
    already = 0
    for i, document in enumerate(documents_of_split(source, survey, held_out=False)):
      # After so many documents, copies of them in all, rounded up.
      repeats = math.ceil((i + 1) * copies) - already
      already += repeats
      for _ in range(repeats):
        if not is_mixture:
          yield document[:TOKENIZER_SAMPLE]
        elif bytes_left > 0:
          yield document[:bytes_left]
          bytes_left -= len(document.encode())


def open_stream(text: Text, tokenizer: Tokenizer, cache: Path, held_out: bool) -> Ids:
  """Returns one side of a text as eod document eod document ..., memory-mapped.

  For a published model it is opening document closing opening document closing ..., see Tokenizer.
  It is tokenised where the cache does not have it.

  Returns:
    [n] uint16, or uint32 where the vocabulary needs it; of a text that comes as ids, as they are.

  Raises:
    ConfigError: the tokenizer makes ids of the text that it must not, see `encode_group`.
  """
  _, source, survey = text
  if isinstance(source, TokenText):
    return source.validation if held_out else source.train
  dtype = id_dtype(tokenizer)
  side_bytes = survey.validation_bytes if held_out else survey.train_bytes

  def build() -> Iterator[bytes]:
    groups = piece_groups(documents_of_split(source, survey, held_out), tokenizer)
    logger.info('tokenising %.1f MB', side_bytes / 1e6)
    groups = telling_progress(groups, bytes_of_group, 'tokenised', side_bytes)
    return encode_groups(groups, tokenizer, num_workers(side_bytes))

  parts = [tokenizer.digest, held_out, survey.held]
  if tokenizer.special.is_published:
    parts += [tokenizer.opening, tokenizer.closing]
  name = digest_of(FORMAT, survey.digest, *parts)
  return open_cached(cache / f'tokens-{name}.{dtype.name}', build).view(dtype)


def read_side(texts: Sequence[Text], held_out: bool) -> bytes:
  """Returns one side of all texts, one after another; of more than TEXT_IN_MEMORY the last part."""
  kept: collections.deque[bytes] = collections.deque()
  size = 0
  for _, source, survey in texts:
    if isinstance(source, TokenText):
      documents = source.text_of_side(held_out)
    else:
      documents = documents_of_split(source, survey, held_out)
    for document in documents:
      kept.append(document.encode())
      size += len(kept[-1])
      while size - len(kept[0]) >= TEXT_IN_MEMORY:
        size -= len(kept.popleft())
  return b''.join(kept)
