"""From a source's text to its streams of token ids, cached on disk: survey, tokenizer, tokens."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError, check
from moejax.data.holdout import Survey, digest_of, documents_of_split, survey_of
from moejax.data.sources import SOURCES, Component, DataConfig, Source
from moejax.data.token_cache import cached
from moejax.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger('moejax')
TOKENIZER_SAMPLE = (
  4 << 20
)  # bytes that a BPE is trained on: more costs start-up time and moves few merges
GROUP = 4 << 20  # characters tokenised at once: bounds memory
RACY = 2.0  # seconds within which two writes of a file may bear the same time
FORMAT = 2  # raise it when what the cache holds for the same text changes


class Text(NamedTuple):
  """The text of a task, read once."""

  component: Component
  source: Source
  survey: Survey


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
  check(
    *(
      f'mixture.{text.component.task}: holds the only document of mixture.{lone[key]}, which trains on most of '
      'it; leave it out of one of the two'
      for text in texts
      for key in text.survey.held
      if key in lone
    )
  )
  return texts


@contextlib.contextmanager
def _naming(cfg: DataConfig, component: Component) -> Iterator[None]:
  """Tells of a mixture's problems which task they are of."""
  try:
    yield
  except ConfigError as error:
    where = f'mixture.{component.task}: ' if cfg.mixture else ''
    raise ConfigError(*(where + problem for problem in error.problems)) from error


def _digest(texts: list[Text]) -> str:
  """Of what is read and how it is mixed; a source alone has its own."""
  if len(texts) == 1:
    return texts[0].survey.digest
  return digest_of([(text.survey.digest, text.component.weight) for text in texts])


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
  supply = max(
    Fraction(text.survey.train_bytes) / Fraction(text.component.weight) for text in texts
  )
  total = supply / (math.ceil(supply / TOKENIZER_SAMPLE) or 1)
  logger.info('training a tokenizer on %.1f MB', total / 1e6)
  for component, source, survey in texts:
    share = Fraction(component.weight) * total
    copies, of = (
      share / (survey.train_bytes or 1)
    ).as_integer_ratio()  # so many in each run of so many documents
    left = int(share)
    for i, text in enumerate(documents_of_split(source, survey, False)):
      for _ in range(
        (-i * copies // of) - (-(i + 1) * copies // of)
      ):  # what ceil(i * copies / of) grows by
        if len(texts) == 1 or left > 0:
          yield text[: TOKENIZER_SAMPLE if len(texts) == 1 else left]
          left -= len(text.encode())


def _stream(text: Text, tokenizer: Tokenizer, cache: Path, held_out: bool) -> np.ndarray:
  """eod document eod document ..., [n] uint16 or uint32, memory-mapped."""
  _, source, survey = text
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
  eod = dtype.type(tokenizer.eod_id).tobytes()

  def build() -> Iterator[bytes]:
    logger.info(
      'tokenising %.1f MB', (survey.validation_bytes if held_out else survey.train_bytes) / 1e6
    )
    for group in _groups(documents_of_split(source, survey, held_out), tokenizer):
      for (opens, _), ids in zip(group, tokenizer.encode_batch([piece for _, piece in group])):
        if ids.size and (ids.max() >= tokenizer.vocab_size or (ids == tokenizer.eod_id).any()):
          raise ConfigError(
            f'tokenizer={tokenizer.name!r} turns text into its end of document (id '
            f'{tokenizer.eod_id}) or ids above its {tokenizer.vocab_size}; take another'
          )
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
