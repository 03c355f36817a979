"""A config file, for the tests of this folder."""

from pathlib import Path

import pytest

from tests.config.small_config import FILE


@pytest.fixture
def default(tmp_path: Path) -> str:
  path = tmp_path / 'base.py'
  path.write_text(FILE)
  return str(path)
