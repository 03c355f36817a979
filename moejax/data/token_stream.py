"""From a source's text to its streams of token ids, cached on disk: survey, tokenizer, tokens."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError, check
from moejax.data.holdout import Survey, digest_of, documents_of_split, survey_of
from moejax.data.sources import SOURCES, Component, DataConfig, Source
from moejax.data.special_tokens import SpecialTokens
from moejax.data.token_cache import open_cached
from moejax.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger('moejax')

# Bytes that a BPE is trained on: more would cost start-up time and move few merges.
TOKENIZER_SAMPLE = 4 << 20
GROUP_CHARACTERS = 4 << 20  # characters tokenised at once: bounds memory
RACY = 2.0  # seconds within which two writes of a file may bear the same time
FORMAT = 2  # raise it when what the cache holds for the same text changes


class Text(NamedTuple):
  """The text of a task, read once."""

  component: Component
  source: Source
  survey: Survey


class DocumentPiece(NamedTuple):
  """A part of a document, which is tokenised by itself."""

  opens_document: bool
  text: str


def survey_texts(cfg: DataConfig, cache: Path) -> list[Text]:
  """Surveys the source of every task, in the order of task ids; what one holds out, all hold out.

  Raises:
    ConfigError: a text cannot be read, or a task trains on the only document of another, of which
      the end is held out.
  """
  texts = []
  for component in cfg.components:
    with name_task_in_errors(cfg, component):
      source = SOURCES[component.config.source](component.config)
      survey = _cached_survey(component.config, source, cache, elsewhere=[])
      texts.append(Text(component, source, survey))
  if len(texts) == 1:
    return texts

  # The digests that each survey holds out. A lone document is held out whole from the other tasks.
  lone_tasks = {text.survey.lone: text.component.task for text in texts if text.survey.lone}
  held = set(lone_tasks)
  for text in texts:
    held.update(text.survey.held)
  elsewhere = sorted(held)
  surveys = [_cached_survey(text.component.config, text.source, cache, elsewhere) for text in texts]
  texts = [text._replace(survey=survey) for text, survey in zip(texts, surveys)]
  check(*(problem for text in texts for problem in _lone_document_problems(text, lone_tasks)))
  return texts


def _lone_document_problems(text: Text, lone_tasks: dict[str, str]) -> list[str]:
  """Returns a problem for each document of the text that is the only one of another task.

  lone_tasks: digest of an only document -> its task.
  """
  task = text.component.task
  return [
    f'mixture.{task}: holds the only document of mixture.{lone_tasks[digest]}, which trains on '
    'most of it; leave it out of one of the two'
    for digest in text.survey.held
    if digest in lone_tasks
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


def _cached_survey(cfg: DataConfig, source: Source, cache: Path, elsewhere: list[str]) -> Survey:
  """Returns the survey; the text is read only where something about the files has changed.

  elsewhere: sorted digests of what other sources hold out, see `survey_of`.
  """
  if time.time() - source.changed < RACY:  # as git does: the next write might leave the same stamp
    return survey_of(source, set(elsewhere))
  path = cache / f'survey-{digest_of(FORMAT, cfg.source, source.stamp, digest_of(elsewhere))}.json'
  survey = open_cached(
    path, lambda: [json.dumps(survey_of(source, set(elsewhere))._asdict()).encode()]
  )
  return Survey(**json.loads(bytes(survey)))


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


def open_stream(text: Text, tokenizer: Tokenizer, cache: Path, held_out: bool) -> np.ndarray:
  """Returns one side of a text as eod document eod document ..., memory-mapped.

  For a published model it is opening document closing opening document closing ..., see Tokenizer.
  It is tokenised where the cache does not have it.

  Returns:
    [n] uint16, or uint32 where the vocabulary needs it.

  Raises:
    ConfigError: the tokenizer turns text into its end-of-document id, or into ids that it says it
      does not have: JAX would clamp those without an error.
  """
  _, source, survey = text
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  opening = np.array(tokenizer.opening, dtype).tobytes()
  closing = np.array(tokenizer.closing, dtype).tobytes()
  side_bytes = survey.validation_bytes if held_out else survey.train_bytes

  def build() -> Iterator[bytes]:
    logger.info('tokenising %.1f MB', side_bytes / 1e6)
    before = b''  # what stands before the next document's opening
    for group in _groups(documents_of_split(source, survey, held_out), tokenizer):
      ids_of_pieces = tokenizer.encode_batch([piece.text for piece in group])
      for piece, ids in zip(group, ids_of_pieces):
        if ids.size and (ids.max() >= tokenizer.vocab_size or (ids == tokenizer.eod_id).any()):
          raise ConfigError(
            f'tokenizer={tokenizer.name!r} turns text into its end of document (id '
            f'{tokenizer.eod_id}) or ids above its {tokenizer.vocab_size}; take another'
          )
        if piece.opens_document:
          yield before + opening
          before = closing
        yield ids.astype(dtype).tobytes()
    yield before

  parts = [tokenizer.digest, held_out, *survey.shared]
  if tokenizer.special.is_published:
    parts += [tokenizer.opening, tokenizer.closing]
  name = digest_of(FORMAT, survey.digest, *parts)
  return open_cached(cache / f'tokens-{name}.{dtype.name}', build).view(dtype)


def _groups(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[DocumentPiece]]:
  """Yields the pieces of all documents in order, about GROUP_CHARACTERS at a time."""
  group: list[DocumentPiece] = []
  size = 0
  for document in documents:
    for i, text in enumerate(tokenizer.pieces(document)):
      group.append(DocumentPiece(i == 0, text))
      size += len(text)
      if size >= GROUP_CHARACTERS:
        yield group
        group, size = [], 0
  yield group


def read_split(texts: Sequence[Text], held_out: bool) -> bytes:
  """Returns one side of all texts, one after another."""
  documents: list[bytes] = []
  for _, source, survey in texts:
    documents += [text.encode() for text in documents_of_split(source, survey, held_out)]
  return b''.join(documents)
