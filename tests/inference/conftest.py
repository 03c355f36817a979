"""Every test decodes short texts by programs that are compiled quickly."""

import pytest

from moejax.inference import sampling
from tests.inference.decode_cases import PROGRAMS


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sampling, 'ROUND', 8)
  for name, program in PROGRAMS.items():
    monkeypatch.setattr(sampling, name, program)
