"""Every test decodes short texts by programs that are compiled quickly."""

import pytest

from moejax.inference import sampling
from tests.support.unoptimised import DECODING


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sampling, 'ROUND', 8)
  for name, program in DECODING.items():
    monkeypatch.setattr(sampling, name, program)
