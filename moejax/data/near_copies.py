"""Which documents are near-copies of each other: MinHash sketches, and groups by them.

  text -> shingles -> sketch;   sketches -> candidate pairs -> groups

A sketch is the one-permutation MinHash of Li, Owen and Zhang (2012, arXiv:1208.1259): a shingle's
hash falls in one of BINS bins, of each bin the smallest is kept, and an empty bin borrows from the
next full one (Shrivastava and Li 2014, arXiv:1406.4784). The share of bins in which two sketches
agree is, on average, the share of shingles that two documents have in common (their Jaccard
similarity). Of a hash 16 bits are kept (b-bit minwise hashing: Li and Konig 2010, arXiv:0908.3271).

All shingles of a text are hashed at once by NumPy: 50 MB/s of a slow core, or 80 us a short
document; a sketch takes 256 bytes. A million documents, half of them copies, are grouped in 17 s.
`datasketch` hashes shingle by shingle in Python: 0.4 MB/s of the same core and the same shingles.

Letters: N documents.
"""

import numpy as np

SHINGLE = 16  # bytes, white space left out: three words of English, five signs of Chinese
BINS = 128
# Two bins to a band: of documents that share a third of their shingles, 99.9% agree in one of 64.
BAND = 2
# From this share on, two documents are near-copies. Where copies are removed, 0.7 to 0.8 is usual;
# here nothing is lost if two documents that are not copies are on one side.
NEAR = 1 / 3
CHUNK = 1 << 20  # shingles hashed at once: bounds memory
PAIRS = 1 << 16  # pairs compared at once: bounds memory

LOWER = bytes(range(256)).lower()
EMPTY = np.uint64(2**64 - 1)
# Odd numbers of many ones and zeros; the second is of Evensen's mixer moremur.
MULTIPLIER, MIXER = 0x9E3779B97F4A7C15, np.uint64(0x3C79AC492BA7B653)
STRIDE = np.uint64(0x9E37)  # added to a borrowed hash for each bin that it comes from further on


def sketch_of(text: str) -> np.ndarray:
  """Returns the sketch of a document, [BINS] u16; letter case and white space do not count."""
  folded = text.encode().translate(LOWER, b' \t\r\n').ljust(SHINGLE, b'\0')
  content = np.frombuffer(folded, np.uint8)
  smallest = np.full(BINS, EMPTY)
  for begin in range(0, len(content) - SHINGLE + 1, CHUNK):
    hashes = _shingle_hashes(content[begin : begin + CHUNK + SHINGLE - 1])
    bins = (hashes >> np.uint64(64 - 7)).astype(np.intp)  # 7 bits tell the bin
    np.minimum.at(smallest, bins, hashes)
  return _fill_empty(smallest).astype(np.uint16)


def _shingle_hashes(content: np.ndarray) -> np.ndarray:
  """Returns a hash of each shingle, [n - SHINGLE + 1] u64.

  content: [n] u8.
  """
  hashes = content.astype(np.uint64)
  width, factor = 1, MULTIPLIER
  # A polynomial in the multiplier, modulo 2^64: that of twice the width from two of the width.
  while width < SHINGLE:
    hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
    factor = factor * factor % 2**64
    width *= 2
  # The low bits of such a polynomial depend on few bits of the text: all are mixed into all.
  for _ in range(2):
    hashes ^= hashes >> np.uint64(32)
    hashes *= MIXER
  hashes ^= hashes >> np.uint64(29)
  return hashes


def _fill_empty(smallest: np.ndarray) -> np.ndarray:
  """Returns the bins with each empty one filled from the next full one, round the end; [BINS]."""
  is_full = smallest != EMPTY
  if is_full.all():
    return smallest
  full_bins = np.flatnonzero(is_full)
  following = np.searchsorted(full_bins, np.arange(BINS)) % len(full_bins)
  distance = (full_bins[following] - np.arange(BINS)) % BINS
  # With the distance: what two documents borrow agrees only if it comes from one place.
  return smallest[full_bins[following]] + distance.astype(np.uint64) * STRIDE


def group_near_copies(sketches: np.ndarray) -> np.ndarray:
  """Returns the group of each document, [N]: the number of the first document in it.

  Near-copies of near-copies are in one group. In a band, documents of one key are compared with the
  first of them only, so that the work grows with N where much of the text is boilerplate, too.

  Args:
    sketches: [N, BINS] u16.
  """
  groups = np.arange(len(sketches))
  keys = np.ascontiguousarray(sketches).view(f'u{2 * BAND}')  # [N, BINS / BAND]
  for band in keys.T:
    pairs = _pairs_of_one_key(band)
    # What earlier bands have joined is not compared again.
    pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
    groups = _join(groups, pairs[_are_near(pairs, sketches)])
  return groups


def _pairs_of_one_key(keys: np.ndarray) -> np.ndarray:
  """Returns each document but the first of a key, with that first one: [n, 2] of first, document.

  keys: [N].
  """
  order = np.argsort(keys, kind='stable')
  is_first = np.append(True, np.diff(keys[order]) != 0)[: len(order)]
  firsts = order[is_first][np.cumsum(is_first) - 1]
  return np.stack([firsts, order], axis=1)[~is_first]


def _are_near(pairs: np.ndarray, sketches: np.ndarray) -> np.ndarray:
  """Returns which pairs are of near-copies, [n] bool.

  Args:
    pairs: [n, 2].
    sketches: [N, BINS].
  """
  is_near = np.zeros(len(pairs), bool)
  for begin in range(0, len(pairs), PAIRS):
    one, other = pairs[begin : begin + PAIRS].T
    agreement = (sketches[one] == sketches[other]).mean(axis=1)
    is_near[begin : begin + PAIRS] = agreement >= NEAR
  return is_near


def _join(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  """Returns the groups after the groups of each pair have become one, the one of smaller number.

  Args:
    groups: [N], the smallest number in each document's group.
    pairs: [n, 2] of documents.
  """
  while True:
    ends = groups[pairs]
    if (ends[:, 0] == ends[:, 1]).all():
      return groups
    groups = groups.copy()
    np.minimum.at(groups, ends.max(axis=1), ends.min(axis=1))
    # Only the first document of a group was moved; the others follow it, however far it goes.
    while not np.array_equal(groups, groups[groups]):
      groups = groups[groups]
