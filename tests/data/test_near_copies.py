"""Sketches tell how much two texts have in common, and groups join what has much."""

import numpy as np
import pytest

from moejax.data import near_copies
from moejax.data.near_copies import BINS, SHINGLE, group_near_copies, sketch_of

LETTERS = list('abcdefghijklmnopqrstuvwxyz')


def letters(seed: int, count: int) -> str:
  return ''.join(np.random.default_rng(seed).choice(LETTERS, count))


def shingles(text: str) -> set[str]:
  return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)}


@pytest.mark.parametrize('size', [60, 400, 9000])
@pytest.mark.parametrize('shared', [0.0, 0.3, 0.6, 0.9, 1.0])
def test_sketches_agree_as_often_as_shingles_do(size: int, shared: float) -> None:
  agreements, similarities = [], []
  for seed in range(12):
    common = letters(seed, int(size * shared))
    one, other = (common + letters(seed + offset, size - len(common)) for offset in (100, 200))
    agreements.append((sketch_of(one) == sketch_of(other)).mean())
    a, b = shingles(one), shingles(other)
    similarities.append(len(a & b) / len(a | b))
  # Twelve texts: the mean of so many draws of at least 45 or BINS each.
  error = 3 * 0.5 / np.sqrt(12 * min(size - SHINGLE + 1, BINS))
  assert np.mean(agreements) == pytest.approx(np.mean(similarities), abs=error)
  assert (shared < 1) == (np.mean(agreements) < 1)


def test_letter_case_and_white_space_do_not_count() -> None:
  text = 'The quick brown fox jumps over the lazy dog.\n'
  assert np.array_equal(sketch_of(text), sketch_of(text.upper().replace('\n', '\r\n') + '  \t'))
  assert not np.array_equal(sketch_of(text), sketch_of(text.replace('dog', 'cat')))


def test_texts_shorter_than_a_shingle_are_near_only_themselves() -> None:
  sketches = np.stack([sketch_of(text) for text in ('', ' ', 'a', 'b', 'A', 'ab')])
  assert group_near_copies(sketches).tolist() == [0, 0, 2, 3, 2, 5]


def test_a_long_text_is_hashed_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
  whole = sketch_of(letters(0, 1000))
  monkeypatch.setattr(near_copies, 'CHUNK', 64)
  assert np.array_equal(sketch_of(letters(0, 1000)), whole)


def test_near_copies_of_near_copies_are_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
  """Each text is half of the one before it: the first and the last have nothing in common."""
  monkeypatch.setattr(near_copies, 'PAIRS', 2)
  parts = [letters(seed, 500) for seed in range(9)]
  chain = [''.join(parts[i : i + 4]) for i in range(6)]
  others = [letters(seed, 2000) for seed in range(20, 30)]
  order = np.random.default_rng(0).permutation(16)
  texts = [(chain + others)[i] for i in order]
  groups = group_near_copies(np.stack([sketch_of(text) for text in texts]))
  is_chain = order < 6
  assert set(groups[is_chain]) == {np.flatnonzero(is_chain)[0]}
  assert groups[~is_chain].tolist() == np.flatnonzero(~is_chain).tolist()


def test_what_only_shares_its_head_is_no_copy() -> None:
  licence = letters(99, 600)
  sketches = np.stack([sketch_of(licence + letters(seed, 3000)) for seed in range(60)])
  assert group_near_copies(sketches).tolist() == list(range(60))


def test_no_documents_have_no_groups() -> None:
  assert group_near_copies(np.zeros((0, BINS), np.uint16)).tolist() == []
