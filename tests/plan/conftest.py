"""What several tests of plans look at, compiled once."""

import pytest

from moejax.plan.planner import compile_on
from moejax.plan.report import CompiledStep
from tests.plan.eight_devices import CONFIG, CPU_8


@pytest.fixture(scope='session')
def compiled_step() -> CompiledStep:
  """CONFIG, compiled for eight devices of the CPU."""
  return compile_on(CONFIG, CPU_8.devices(), CPU_8)
