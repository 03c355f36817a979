"""The documents of a source: read once to be split, then one side at a time.

Source -> documents -> Reading -> Survey (see split.py) -> documents of one side
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moejax.config import ConfigError
from moejax.data.near_copies import BINS, sketch_of
from moejax.data.progress import telling_progress
from moejax.data.sources import Source
from moejax.data.text_digest import digest_of_text

HELD_OUT = 0.05  # of a source's bytes


class Reading(NamedTuple):
  """A source, read once. n documents, of which m differ."""

  digest: str  # of all documents in order
  lone: str  # digest of the only document, before it was cut in two; '' if there are more
  order: np.ndarray  # [n] i64, the documents as numbers of the different ones
  digests: list[str]  # [m]
  sizes: np.ndarray  # [m] i64, bytes
  sketches: np.ndarray  # [m, BINS] u16


class Survey(NamedTuple):
  """What is learnt of a source by reading it. It is stored in the cache by these names."""

  digest: str  # of all documents in order
  held: list[str]  # sorted digests of the documents held out
  lone: str  # see Reading
  lone_copies: list[str]  # the `lone` of other sources that have near-copies here
  has_near_copies: bool  # whether what trains has near-copies of what is held out
  train_bytes: int
  validation_bytes: int
  validation_sizes: list[int]  # bytes of each document held out, in order, copies too
  validation_groups: list[int]  # of each of them the number of its group of near-copies


class SplitDocuments(NamedTuple):
  """The documents of a source, of which each is on one side."""

  lone: str  # see Reading
  documents: Iterator[str]  # those that are not empty, in order


def digest_of(*parts: object) -> str:
  """Returns 32 hex digits of anything whose repr tells all about it."""
  return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def documents_to_split(source: Source) -> SplitDocuments:
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
  return SplitDocuments(digest_of_text(text), iter([text[:cut], text[cut:]]))


def bytes_of_text(text: str) -> int:
  """Returns how many bytes a text is in UTF-8."""
  return len(text.encode())


def read_source(source: Source) -> Reading:
  """Reads the source once; says how far it is where that takes long."""
  lone, documents = documents_to_split(source)
  numbers: dict[str, int] = {}  # digest -> its place among the different ones
  order, sizes = [], []
  sketches = bytearray()  # and not a list of arrays, which takes half as much again
  all_digests = hashlib.blake2b(digest_size=16)
  for text in telling_progress(documents, bytes_of_text, 'read the text:'):
    digest = digest_of_text(text)
    all_digests.update(digest.encode())
    if digest not in numbers:
      numbers[digest] = len(numbers)
      sizes.append(bytes_of_text(text))
      sketches += sketch_of(text).tobytes()
    order.append(numbers[digest])
  return Reading(
    digest=all_digests.hexdigest(),
    lone=lone,
    order=np.array(order, np.int64),
    digests=list(numbers),
    sizes=np.array(sizes, np.int64),
    sketches=np.frombuffer(sketches, np.uint16).reshape(-1, BINS),
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
  all_digests = hashlib.blake2b(digest_size=16)
  for text in documents_to_split(source).documents:
    digest = digest_of_text(text)
    all_digests.update(digest.encode())
    if (digest in held) == held_out:
      yield text
  if all_digests.hexdigest() != survey.digest:
    raise ConfigError('the text has changed since it was first read: start again')
