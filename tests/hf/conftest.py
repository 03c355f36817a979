"""What tests of the commands share."""

import jax
import pytest

from moejax.hf import logits
from tests.support.quick import QUICK


@pytest.fixture
def cheap_programs(monkeypatch: pytest.MonkeyPatch) -> None:
  """Logits are run once or twice: their program is compiled quickly, and may be slow."""
  quick = jax.jit(logits.whole_row_logits.__wrapped__, compiler_options=QUICK)
  monkeypatch.setattr(logits, 'whole_row_logits', quick)
