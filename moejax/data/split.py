"""Which documents are held out: about 5% of the bytes of each source, of a large one less.

readings -> surveys

What is held out is a group of near-copies (see near_copies.py) with all its copies, whole and from
all sources of a mixture alike. Groups are taken in an order that is as good as chance, and depends
neither on where the files lie nor on their order.

Letters: N different documents of all sources, R sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moejax.data.holdout import HELD_OUT, Reading, Survey, digest_of_text
from moejax.data.near_copies import BINS, group_near_copies

# Bytes of a source: more would make a validation hours long, and no better. The same of ids is in
# token_source.py.
MOST_HELD_OUT = 64 << 20


class Documents(NamedTuple):
  """The different documents of all sources, sorted by digest: numbers do not hang on file names."""

  digests: list[str]  # [N]
  groups: np.ndarray  # [N] i64, the smallest number in the group of near-copies
  num_bytes: np.ndarray  # [R, N] i64, all copies; 0 in a source of a lone document


def surveys_of(readings: Sequence[Reading]) -> list[Survey]:
  """Chooses what is held out of each source.

  Of a lone document that is its end. Of other sources, where 5% of the bytes stands for at most
  MOST_HELD_OUT bytes,
  - groups of at most 5% of the bytes are taken until 5% are reached;
  - where that makes less than half of it, single documents out of larger groups are taken, too;
  - where that makes nothing, the smallest group is, or document if all are near-copies.
  """
  digests = sorted(set().union(*(reading.digests for reading in readings)))
  number_of = {digest: number for number, digest in enumerate(digests)}
  numbers = [
    np.array(list(map(number_of.__getitem__, reading.digests)), np.int64) for reading in readings
  ]
  sketches = np.zeros((len(digests), BINS), np.uint16)
  num_bytes = np.zeros((len(readings), len(digests)), np.int64)
  starts: dict[str, int] = {}  # digest of a lone document -> number of the part that trains
  ends = []  # of the parts that are held out
  for source, (reading, of_source) in enumerate(zip(readings, numbers)):
    sketches[of_source] = reading.sketches
    if reading.lone:
      starts[reading.lone] = int(of_source[0])
      ends.append(int(of_source[-1]))
    else:
      copies = np.bincount(reading.order, minlength=len(of_source))
      num_bytes[source, of_source] = reading.sizes * copies
  documents = Documents(digests, group_near_copies(sketches), num_bytes)
  held = _choose(documents, list(starts.values()), ends)
  return [
    _survey(reading, of_source, documents, held=held, starts=starts)
    for reading, of_source in zip(readings, numbers)
  ]


def _choose(documents: Documents, starts: list[int], ends: list[int]) -> np.ndarray:
  """Returns which documents are held out, [N] bool; see `surveys_of`.

  starts, ends: numbers of the parts of lone documents, of which the ends are held out.
  """
  _, groups, num_bytes = documents
  singles = np.arange(len(groups))
  share = _bytes_to_hold_out(num_bytes)
  is_free = ~np.isin(groups, groups[starts])
  held = np.isin(groups, groups[ends]) & is_free
  held = _take(documents, groups, held | ~is_free, np.full(len(share), True)) & is_free
  has_few = (num_bytes * held).sum(axis=1) < share / 2
  held = _take(documents, singles, held | ~is_free, has_few) & is_free
  for of_source in num_bytes:
    is_here = (of_source > 0) & is_free
    if is_here.any() and not (is_here & held).any():
      units = groups if len(np.unique(groups[is_here])) > 1 else singles
      sizes = np.bincount(units, of_source * is_here)
      held |= units == min(np.unique(units[is_here]), key=sizes.__getitem__)
  return held


def _bytes_to_hold_out(num_bytes: np.ndarray) -> np.ndarray:
  """Returns how many bytes of each source are to be held out, [R]; num_bytes as in Documents."""
  return np.minimum(HELD_OUT * num_bytes.sum(axis=1), MOST_HELD_OUT)


def _take(
  documents: Documents, units: np.ndarray, gone: np.ndarray, wanting: np.ndarray
) -> np.ndarray:
  """Returns `gone`, and the units that are taken until every source that wants some has its share.

  Args:
    units: [N], a number for each document; those of one number are taken together.
    gone: [N] bool, documents whose units are not to be had.
    wanting: [R] bool.
  """
  digests, _, num_bytes = documents
  share = _bytes_to_hold_out(num_bytes)
  unit_bytes = np.stack([np.bincount(units, row, minlength=len(units)) for row in num_bytes])
  fits = (unit_bytes <= share[:, None]).all(axis=0)
  fits[units[gone]] = False
  taken_bytes = (num_bytes * gone).sum(axis=1).astype(float)
  taken = []
  # The digest of a digest: a group is numbered by its least one, which is less in a large group.
  candidates = np.unique(units)[fits[np.unique(units)]]
  for unit in sorted(candidates, key=lambda number: digest_of_text(digests[number])):
    lacking = wanting & (taken_bytes < share)
    if not lacking.any():
      break
    if unit_bytes[lacking, unit].any():
      taken.append(unit)
      taken_bytes += unit_bytes[:, unit]
  return gone | np.isin(units, taken)


def _survey(
  reading: Reading,
  numbers: np.ndarray,
  documents: Documents,
  *,
  held: np.ndarray,
  starts: dict[str, int],
) -> Survey:
  """Returns the survey of one source.

  Args:
    reading: of the source.
    numbers: [m], of its different documents among all.
    documents: of all sources.
    held: [N] bool, which of them are held out.
    starts: digest of each lone document -> the number of the part that trains.
  """
  is_held = held[numbers]
  if reading.lone:
    is_held = np.arange(len(numbers)) == len(numbers) - 1
  groups = documents.groups[numbers]
  is_held_in_order = is_held[reading.order]
  sizes = reading.sizes[reading.order]
  lone_copies = []
  for lone, start in starts.items():
    if lone != reading.lone and documents.groups[start] in groups:
      lone_copies.append(lone)
  return Survey(
    digest=reading.digest,
    held=sorted(reading.digests[i] for i in np.flatnonzero(is_held)),
    lone=reading.lone,
    lone_copies=lone_copies,
    has_near_copies=bool(np.isin(groups[is_held], groups[~is_held]).any()),
    train_bytes=int(sizes[~is_held_in_order].sum()),
    validation_bytes=int(sizes[is_held_in_order].sum()),
    validation_sizes=sizes[is_held_in_order].tolist(),
    validation_groups=groups[reading.order][is_held_in_order].tolist(),
  )
