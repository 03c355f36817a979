"""The marks of tests that compile ahead of time for chips that need not be here."""

import importlib.util

import pytest

from moejax.plan.topology import EXTRAS

MARKS = {'libtpu': pytest.mark.tpu_aot, 'jax_cuda13_plugin': pytest.mark.cuda_aot}


def needs_compiler(plugin: str) -> list[pytest.MarkDecorator]:
  """The `pytestmark` of a file: slow, and left out where the plug-in is not installed."""
  extra = EXTRAS[plugin]
  is_missing = importlib.util.find_spec(plugin) is None
  reason = f'{plugin} is not installed: pip install "moejax[{extra}]"'
  return [MARKS[plugin], pytest.mark.slow, pytest.mark.skipif(is_missing, reason=reason)]
