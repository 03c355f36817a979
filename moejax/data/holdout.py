"""Which documents of a text are held out.   Source -> documents -> survey -> split

Of a mixture, each source is surveyed by itself and then again with what the others hold out in hand, so that a
document that lies in two of them is on one side in both.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterator
from typing import NamedTuple

from moejax.config import check
from moejax.data.sources import Source

HELD_OUT = 0.05  # of a source's bytes


class Survey(NamedTuple):
  """What one reading of a source tells."""

  digest: str
  held: list[str]  # digests of the documents held out
  shared: list[str]  # those of them that were not this source's choice
  lone: str  # digest of the only document, before it was cut in two; '' if there are more
  train_bytes: int
  validation_bytes: int


def digest_of(*parts: object) -> str:
  """32 hex digits of anything whose repr tells all about it."""
  return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _documents(source: Source) -> tuple[str, Iterator[str]]:
  """(Survey.lone, the documents that are not empty); a lone one comes as two, its last 5% apart, cut at a line end."""
  texts = filter(None, source.documents())
  head, lone = list(itertools.islice(texts, 2)), ''
  if len(head) == 1:
    text = head[0]
    cut = int((1 - HELD_OUT) * len(text))
    cut = text.rfind('\n', int((1 - 2 * HELD_OUT) * len(text)), cut) + 1 or cut
    head, lone = [text[:cut], text[cut:]], _key(text)
  return lone, itertools.chain(head, texts)


def _key(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def survey_of(source: Source, elsewhere: Collection[str] = ()) -> Survey:
  """Reads the source once and holds documents out in the order of their digests: as good as chance, the
  same wherever the files lie, and two copies of a document fall on one side. A document above 5% of the bytes
  is not taken; where all are, the smallest is. What other sources hold out, `elsewhere`, is taken on top."""
  lone, texts = _documents(source)
  sizes = [(_key(text), len(text.encode())) for text in texts]
  total = sum(size for _, size in sizes)
  fitting = sorted({(key, size) for key, size in sizes if size <= HELD_OUT * total})
  held, taken = set(), 0
  for key, size in fitting or sorted(sizes, key=lambda entry: entry[1])[:1]:
    if taken < HELD_OUT * total:
      held.add(key)
      taken += size
  shared = {key for key, _ in sizes if key in elsewhere} - held
  held |= shared
  validation = sum(size for key, size in sizes if key in held)
  digest = digest_of([key for key, _ in sizes])
  return Survey(digest, sorted(held), sorted(shared), lone, total - validation, validation)


def documents_of_split(source: Source, survey: Survey, held_out: bool) -> Iterator[str]:
  """The documents of one side; ConfigError at the end when the text is not the one that was surveyed."""
  held, keys = set(survey.held), []
  for text in _documents(source)[1]:
    keys.append(_key(text))
    if (keys[-1] in held) == held_out:
      yield text
  is_same = digest_of(keys) == survey.digest
  check('' if is_same else 'the text has changed since it was first read: start again')
