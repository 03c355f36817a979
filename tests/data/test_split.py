"""A share of the bytes is held out, copies and near-copies on one side, whatever their order."""

import random
from collections.abc import Sequence

import numpy as np
import pytest

from moejax.data import split as split_module
from moejax.data.holdout import Survey, digest_of_text, documents_of_split, read_source
from moejax.data.sources import Source
from moejax.data.split import surveys_of
from tests.data.test_near_copies import letters


def source_of(documents: Sequence[str]) -> Source:
  return Source(lambda: iter(documents), stamp='', changed=0.0)


def split(*texts: Sequence[str]) -> list[Survey]:
  return surveys_of([read_source(source_of(documents)) for documents in texts])


def share(survey: Survey) -> float:
  return survey.validation_bytes / (survey.train_bytes + survey.validation_bytes)


def documents(count: int, seed: int = 0) -> list[str]:
  sizes = np.random.default_rng(seed).integers(100, 700, count)
  return [letters(1000 * seed + i, int(size)) for i, size in enumerate(sizes)]


def edited(text: str) -> str:
  """The same text but for a word in its middle."""
  return text[: len(text) // 2] + 'edited' + text[len(text) // 2 :]


@pytest.mark.parametrize('copies', [1, 2, 10, 20])
def test_copies_count_as_bytes(copies: int) -> None:
  (survey,) = split(documents(300) * copies)
  assert 0.05 <= share(survey) < 0.055 and not survey.has_near_copies
  assert len(survey.validation_sizes) == copies * len(survey.held)
  assert sum(survey.validation_sizes) == survey.validation_bytes


def test_of_a_large_source_less_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(split_module, 'MOST_HELD_OUT', 3000)
  few, many = split(documents(100), documents(900, seed=1))
  assert 0.05 <= share(few) < 0.06 and 3000 <= many.validation_bytes < 3700


def test_some_documents_have_copies_and_near_copies() -> None:
  texts = documents(400)
  upsampled = [text for text in texts[:40] for _ in range(10)]
  family = [edited(text) for text in texts[40:200]]
  everything = texts + upsampled + family
  (survey,) = split(everything)
  assert 0.05 <= share(survey) < 0.07 and not survey.has_near_copies
  held = set(survey.held)
  for text in texts[40:200]:
    assert (digest_of_text(text) in held) == (digest_of_text(edited(text)) in held)
  sides = [list(documents_of_split(source_of(everything), survey, held_out)) for held_out in (0, 1)]
  assert sorted(sides[0] + sides[1]) == sorted(everything) and not set(sides[0]) & set(sides[1])
  assert survey.validation_sizes == [len(text) for text in sides[1]]
  group_of = dict(zip(sides[1], survey.validation_groups))
  pairs = [text for text in texts[40:200] if text in group_of]
  assert pairs and all(group_of[text] == group_of[edited(text)] for text in pairs)
  assert len(set(group_of.values())) == len(group_of) - len(pairs)


def test_the_split_does_not_hang_on_the_order_of_documents() -> None:
  texts = documents(200)
  texts += [edited(text) for text in texts[:50]]
  shuffled = random.Random(0).sample(texts, len(texts))
  (first,), (second,) = split(texts), split(shuffled)
  assert first.held == second.held and first.digest != second.digest


def test_a_large_family_is_as_likely_to_be_held_out_as_a_single_document() -> None:
  singles = [letters(i, 200) for i in range(1200)]
  families = [
    [letters(10_000 + i, 180) + letters(9 * i + j, 20) for j in range(8)] for i in range(1, 151)
  ]
  (survey,) = split(singles + [text for family in families for text in family])
  held = set(survey.held)
  # 60 of 1200 are expected, give or take 8: a family of 8 would be taken 8 times as often by its
  # smallest digest, and 13 singles with it.
  assert 36 <= sum(digest_of_text(text) in held for text in singles) <= 84
  assert all(len({digest_of_text(text) in held for text in family}) == 1 for family in families)


def test_a_family_of_most_of_the_text_is_trained_on_where_others_are_left() -> None:
  table = letters(5, 3000)
  family = [table + letters(100 + i, 40) for i in range(60)]
  (survey,) = split(family + documents(60))
  assert not {digest_of_text(text) for text in family} & set(survey.held)
  assert not survey.has_near_copies and 0.05 <= share(survey) < 0.06


def test_a_family_is_torn_only_where_nothing_else_is_left() -> None:
  table = letters(5, 3000)
  family = [table + letters(100 + i, 40) for i in range(60)]
  for texts in (family, [*family, letters(3, 200)]):
    (survey,) = split(texts)
    assert survey.has_near_copies and 0.05 <= share(survey) < 0.07


def test_of_few_documents_the_smallest_family_is_held_out() -> None:
  table = letters(5, 3000)
  texts = [table, edited(table), letters(6, 7000), letters(7, 6500)]
  (survey,) = split(texts)
  assert survey.held == sorted([digest_of_text(table), digest_of_text(edited(table))])
  assert not survey.has_near_copies
  (survey,) = split(texts[:2])
  assert survey.held == [digest_of_text(table)] and survey.has_near_copies


def test_near_copies_in_other_sources_are_on_the_same_side() -> None:
  notes = documents(100)
  code = documents(300, seed=1) + [edited(text) for text in notes]
  surveys = split(code, notes)
  held = {digest for survey in surveys for digest in survey.held}
  assert all((digest_of_text(t) in held) == (digest_of_text(edited(t)) in held) for t in notes)
  assert [survey.has_near_copies for survey in surveys] == [False, False]
  assert all(0.05 <= share(survey) < 0.15 for survey in surveys)
  # Where the end of a lone document is held out, its copies elsewhere are, too.
  lone = '\n'.join(documents(20, seed=3))
  whole, _ = surveys = split([lone], notes)
  end = next(documents_of_split(source_of([lone]), whole, held_out=True))
  surveys = split([lone], [*notes, edited(end)])
  assert digest_of_text(edited(end)) in surveys[1].held and not surveys[1].lone_copies
  surveys = split([lone], [*notes, edited(lone)])
  assert surveys[1].lone_copies == [digest_of_text(lone)]
