"""Folders of texts, for the tests of this folder."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.mixed_texts import LETTERS
from tests.data.plain_texts import random_document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """Sixty documents, from one word to rows and rows of them."""
  rng = np.random.default_rng(0)
  (tmp_path / 'text').mkdir()
  for i in range(60):
    (tmp_path / 'text' / f'{i:02}.txt').write_text(
      random_document(rng, int(rng.integers(1, 90))), encoding='utf-8'
    )
  return tmp_path


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
  """A folder for each task, of many documents; notes has few and so goes round often."""
  for seed, (task, count) in enumerate({'code': 90, 'maths': 60, 'notes': 25}.items()):
    rng = np.random.default_rng(seed)
    (tmp_path / task).mkdir()
    for i in range(count):
      text = ''.join(rng.choice(list(LETTERS[task]), int(rng.integers(5, 120)))) + '\n'
      (tmp_path / task / f'{i:02}.txt').write_text(text, encoding='utf-8')
  return tmp_path
