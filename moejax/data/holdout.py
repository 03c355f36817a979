"""Which documents of a text are held out.   Source -> documents -> survey -> split

Of a mixture, each source is surveyed by itself and then again with what the others hold out, so
that a document that lies in two of them is on one side in both.
"""

import hashlib
import itertools
from collections.abc import Collection, Iterator
from typing import NamedTuple

from moejax.config import ConfigError
from moejax.data.sources import Source

HELD_OUT = 0.05  # of a source's bytes


class Survey(NamedTuple):
  """What is learnt of a source by reading it once. It is stored in the cache by these names."""

  digest: str  # of all documents in order
  held: list[str]  # digests of the documents held out
  shared: list[str]  # those of `held` that were not this source's choice
  lone: str  # digest of the only document, before it was cut in two; '' if there are more
  train_bytes: int
  validation_bytes: int


class SplitDocuments(NamedTuple):
  """The documents of a source, of which each is on one side."""

  lone: str  # see Survey
  documents: Iterator[str]  # those that are not empty, in order


def digest_of(*parts: object) -> str:
  """Returns 32 hex digits of anything whose repr tells all about it."""
  return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _documents_to_split(source: Source) -> SplitDocuments:
  """Returns the documents; a lone one comes as two, its last 5% apart, cut at a line end."""
  documents = filter(None, source.documents())
  first_two = list(itertools.islice(documents, 2))
  if len(first_two) != 1:
    return SplitDocuments('', itertools.chain(first_two, documents))
  text = first_two[0]
  latest = int((1 - HELD_OUT) * len(text))
  earliest = int((1 - 2 * HELD_OUT) * len(text))
  # After the last line end in between, and in the middle of a line where there is none.
  cut = text.rfind('\n', earliest, latest) + 1 or latest
  return SplitDocuments(_digest_of_text(text), iter([text[:cut], text[cut:]]))


def _digest_of_text(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def survey_of(source: Source, elsewhere: Collection[str] = ()) -> Survey:
  """Reads the source once and chooses which documents are held out, about 5% of the bytes.

  They are taken in the order of their digests: as good as chance, the same wherever the files lie,
  and two copies of a document fall on one side. A document above 5% of the bytes is not taken;
  where all are, the smallest is.

  Args:
    source: the text.
    elsewhere: digests of what other sources of the mixture hold out, and this one then does too.
  """
  lone, documents = _documents_to_split(source)
  sizes = [(_digest_of_text(text), len(text.encode())) for text in documents]
  total = sum(size for _, size in sizes)
  fitting = sorted({(digest, size) for digest, size in sizes if size <= HELD_OUT * total})
  smallest = sorted(sizes, key=lambda entry: entry[1])[:1]
  held: set[str] = set()
  held_bytes = 0
  for digest, size in fitting or smallest:
    if held_bytes < HELD_OUT * total:
      held.add(digest)
      held_bytes += size
  shared = {digest for digest, _ in sizes if digest in elsewhere} - held
  held |= shared
  # Counted anew, and not held_bytes: every copy of a document counts.
  validation_bytes = sum(size for digest, size in sizes if digest in held)
  return Survey(
    digest=digest_of([digest for digest, _ in sizes]),
    held=sorted(held),
    shared=sorted(shared),
    lone=lone,
    train_bytes=total - validation_bytes,
    validation_bytes=validation_bytes,
  )


def documents_of_split(source: Source, survey: Survey, held_out: bool) -> Iterator[str]:
  """Yields the documents of one side.

  Args:
    source: the text.
    survey: of this text.
    held_out: which side.

  Raises:
    ConfigError: at the end, where the text is not the one that was surveyed.
  """
  held = set(survey.held)
  digests = []
  for text in _documents_to_split(source).documents:
    digest = _digest_of_text(text)
    digests.append(digest)
    if (digest in held) == held_out:
      yield text
  if digest_of(digests) != survey.digest:
    raise ConfigError('the text has changed since it was first read: start again')
