"""A plan in words, and what would help where it does not fit."""

import pytest

from moejax.plan.report import CompiledStep, fits, needed_bytes, plan_lines
from tests.plan.eight_devices import CPU_8, SECTIONS, eight_chips


@pytest.mark.slow
def test_a_plan_in_words(compiled_step: CompiledStep) -> None:
  text = '\n'.join(plan_lines(compiled_step, eight_chips('h200')._replace(sizes=(8,))))
  assert all(section in text for section in SECTIONS)
  assert 'it fits' in text and 'rules:' in text and 'over NVLink, 450 GB/s' in text
  small = eight_chips('v5e', memory=needed_bytes(compiled_step) / 2)
  text = '\n'.join(plan_lines(compiled_step, small))
  assert 'it does not fit' in text and '--plan=fit' in text
  assert '--config.micro_batches=4: about ' in text
  assert (
    not fits(compiled_step, small)
    and fits(compiled_step, eight_chips('v5e'))
    and fits(compiled_step, CPU_8)
  )
