"""A foreign function or a claim that is no use is an error; a certificate is shown and written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moejax import certify
from moejax.config import ConfigError
from tests.certify import foreign_losses as foreign
from tests.certify.certificate_samples import certify_quietly

ROOT = Path(__file__).parents[2]
Array = np.ndarray


@pytest.mark.parametrize(
  ('function', 'arguments', 'problem'),
  [
    (foreign.sequence, {'like': 'sequences'}, r"like='sequences' is not one of \['ep_group'"),
    (foreign.sequence, {'topk': 2}, 'topk: no such field; did you mean top_k'),
    (foreign.sequence, {'top_k': 8}, 'top_k=8: use 1 to 7'),
    (foreign.sequence, {'top_k': '2'}, "top_k='2': use a value of type int"),
    (foreign.sequence, {'factor': np.nan}, 'factor=nan: use a finite number'),
    (foreign.sequence, {'pooled': True}, 'pooled=True needs several layers'),
    (foreign.sequence, {'row_sets': 2}, "row_sets=2 says nothing of like='sequence'"),
    (foreign.sequence, {'dtype': 'bfloat16'}, "dtype='bfloat16' is not one of"),
    (foreign.sequence, {'seed': -1}, 'seed=-1: use 0 or more'),
    (3, {}, 'function=3 cannot be called: use a function'),
    (lambda x: 1.0, {}, r"parameter 'x' of .* is not one of \['logits', .*rename it"),
    (lambda mask: 1.0, {}, 'takes no logits: name one of its parameters logits'),
    (lambda logits: 1 / 0, {}, r'raised ZeroDivisionError: .*logits \(4, 8, 8\).*mend it'),
    (lambda logits: logits.mean(-1), {}, r'has shape \(4, 8\): return one number, of shape \(\)'),
    (lambda logits: np.nan, {}, 'value is nan of plain logits'),
    (lambda logits: 1, {}, 'has dtype int64: return float32 or float64'),
    (lambda logits: logits.mean().astype(np.float16), {}, 'has dtype float16: return float32'),
    (lambda logits: None, {}, 'has dtype object: return float32 or float64'),
    (lambda logits: (1.0, logits[0]), {}, r'gradient has shape \(8, 8\): return the gradient to'),
    (lambda logits: np.random.default_rng().random(), {}, 'fix the seed of what it draws'),
    (lambda logits: 1.0, {'like': 'router'}, 'a router returned float: return a pair'),
    (lambda logits: (logits, logits), {'like': 'router'}, r'shape \(4, 8, 8\): return the experts'),
    (
      lambda logits: (logits[..., :2], logits[..., :2]),
      {'like': 'router'},
      'expert_ids have dtype float32: return integers',
    ),
    (
      lambda logits: (np.full((4, 8, 2), 8), logits[..., :2]),
      {'like': 'router'},
      'expert_ids are 8 to 8: return 0 to 7',
    ),
  ],
)
def test_bad_input_is_an_error_that_names_value_field_and_remedy(
  function: Callable, arguments: dict[str, object], problem: str
) -> None:
  with pytest.raises(ConfigError, match=problem):
    certify_quietly(function, **arguments)


def times_k(logits: Array, expert_ids: Array, mask: Array) -> np.floating:
  return 2 * foreign.sequence(logits, expert_ids, mask)


def test_a_certificate_is_printed_and_written(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  certificate = certify.check(times_k, num_experts=4, out=str(tmp_path), seed=3)
  printed = capsys.readouterr().out
  assert '✗ value' in printed and '2 (K) times' in printed and 'FAILED: value' in printed
  found = json.loads((tmp_path / 'certificate.json').read_text())
  assert not found['passed'] and found['seed'] == 3 and 'times_k' in found['command']
  names = [line['name'] for line in found['lines']]
  assert names == ['value', 'gradient', 'balance', 'padding', 'shrink']
  assert 'explained' in (tmp_path / 'certificate.md').read_text()
  badge = json.loads((tmp_path / 'badge.json').read_text())
  assert badge.keys() == {'schemaVersion', 'label', 'message', 'color'} and badge['color'] == 'red'
  assert certificate.about['commit'] in badge['message']


def test_the_face_loads_no_framework() -> None:
  """A foreign function may hold the accelerator."""
  code = 'import sys, moejax.certify; print(*({"jax", "torch", "flax"} & sys.modules.keys()))'
  run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
  assert run.returncode == 0 and not run.stdout.strip(), run.stdout + run.stderr
