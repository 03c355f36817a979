"""The journal: every name reaches metrics.jsonl and TensorBoard, a resumed run's story is the
straight one's."""

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moejax.data.held_out_rows import HeldOutDocuments
from moejax.data.pipeline import Size
from moejax.data.sources import DataConfig
from moejax.model.config import ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.moe.statistics import (
  STATISTICS,
  Stats,
  bias_statistics,
  layer_statistics,
  token_statistics,
)
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.journal import Journal

L, E, K, STEPS = 2, 4, 2, 6
CLOCK = ('tokens_per_second', 'mfu', 'input_wait')
DATA = SimpleNamespace(
  tasks=('prose', 'code'),
  bytes_per_token=3.0,
  validation_tokens=300,
  validation_bytes=900,
  sizes=(Size(0, 0, 100, 300, 3.0), Size(0, 0, 200, 600, 3.0)),
  documents=HeldOutDocuments(np.full(9, 100), np.arange(9), np.repeat([0, 1], [3, 6])),
  fingerprint={'source_digest': 'a', 'held_out': 'b', 'tokenizer_digest': 'c'},
  train_text=lambda: b'some text to train on',
  validation_text=lambda: b'some held-out text',
)


def stats(rng: np.random.Generator) -> Stats:
  sizes = {'pairs': (L, E, E), 'probs': (L, E)}
  return Stats(*(1 + rng.random(sizes[name] if name in sizes else L) for name in Stats._fields))


def of_step(step: int) -> dict[str, object]:
  """What a training step returns."""
  rng = np.random.default_rng(step)
  load = rng.integers(0, 40, (L, E)).astype(np.float32)
  layers = (
    layer_statistics(load, K)
    | token_statistics(stats(rng))
    | bias_statistics(rng.normal(size=(L, E)))
  )
  scalars = {
    name: np.float32(rng.random())
    for name in (
      'lm_loss',
      'nll',
      'loss',
      'grad_norm',
      'balance/sequence',
      'stability',
      'loss_spikes',
      'grad_norm_spikes',
    )
  }
  return scalars | {
    'lm_loss/prose': np.float32(math.nan),
    'lm_loss/code': np.float32(2.0),
    'skipped': np.bool_(0),
    'load': load,
    'layers': layers | {'dropped': rng.random(L)},
  }


def of_validation(step: int) -> tuple[dict[str, object], np.ndarray]:
  """What a validation of a part of the text adds up to, and the one of all of it at the end."""
  rng = np.random.default_rng(1000 + step)
  document_nll = rng.random(9) * 100
  sums = {
    'task_nll': np.array([document_nll[:3].sum(), document_nll[3:].sum()]),
    'task_tokens': np.array([100.0, 200.0]) if step == STEPS else np.array([30.0, 70.0]),
    'document_nll': document_nll,
    'stats': stats(rng),
    'load': rng.integers(0, 90, (L, E)).astype(float),
  }
  return sums, rng.integers(0, E, (L, 50, K)).astype(np.uint16)


def run(workdir: Path, begin: int, end: int, steps: int = STEPS, log_every: int = 1) -> None:
  """Steps begin + 1 to end, with a validation after each even one of the first ones."""
  model = ModelConfig(moe=MoEConfig(router=RouterConfig(E, K)))
  workdir.mkdir(exist_ok=True)
  cfg = ExperimentConfig(
    steps=steps,
    log_every=log_every,
    workdir=str(workdir),
    model=model,
    data=DataConfig(cache_dir=f'{workdir}.cache'),
  )
  with Journal(cfg, DATA, 10**9, begin) as journal:
    for step in range(begin + 1, end + 1):
      journal.step(step, of_step(step))
      if step % 2 == 0 and step < STEPS:
        journal.validation(
          step, *of_validation(step), {'router_ratio': np.float32(0.5)}, 'def f():'
        )
    if end == STEPS:
      journal.report('d' * 64, journal.validation(STEPS, *of_validation(STEPS), {}, 'def f():'))


def rows(workdir: Path) -> list[dict[str, object]]:
  text = (workdir / 'metrics.jsonl').read_text()
  lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
  return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def board(workdir: Path) -> object:
  from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

  found = EventAccumulator(str(workdir / 'tensorboard'), tensor_size_guidance={'scalars': 0})
  found.Reload()
  return found


@pytest.fixture(scope='module')
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
  workdir = tmp_path_factory.mktemp('journal') / 'run'
  run(workdir, 0, STEPS)
  return workdir


def test_metrics_jsonl_gets_all(straight: Path) -> None:
  found = rows(straight)
  first = found[0]
  assert set(first['layers']) == set(STATISTICS) - {'churn'}
  for name, values in first['layers'].items():
    assert len(values) == L and first[name] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
    assert any(
      first[f'{name}_worst'] == pytest.approx(value, rel=1e-4, abs=1e-6) for value in values
    )
  assert {
    'perplexity',
    'expert_usage',
    'balance_score',
    'stability',
    'noise_floor',
    'bits_per_byte',
  } <= set(first)
  assert first['lm_loss/prose'] is None and first['lm_loss/code'] == 2
  tests = [row for row in found if 'eval/lm_loss' in row]
  assert [row['step'] for row in tests] == [2, 4, 6]
  assert {f'eval/{name}' for name in tests[1]['eval/layers']} < set(tests[1])
  assert {'eval/churn_worst', 'eval/lm_loss/prose', 'eval/perplexity'} < set(tests[1])
  assert set(tests[1]['eval/layers']) == set(STATISTICS) - {
    'bias_max',
    'bias_mean',
    'bias_std',
    'dropped',
  }
  assert (
    tests[0]['interference/router_ratio'] == 0.5 and 'interference/router_ratio' not in tests[2]
  )
  assert 'churn' not in tests[0]['eval/layers']  # there was nothing before it
  assert found[-1]['step'] == STEPS and list(found[-1]['eval/saturation']) == ['2', '4']
  assert all(len(share) == L for share in found[-1]['eval/saturation'].values())


def test_tensorboard_gets_every_scalar_and_the_load(straight: Path) -> None:
  found = board(straight)
  tags = set(found.Tags()['tensors'])
  scalars = {
    name for row in rows(straight) for name, value in row.items() if isinstance(value, float | None)
  }
  assert scalars <= tags and {'eval/saturation', 'eval/saturation_worst', 'sample'} <= tags
  assert {f'expert_load/layer_{layer}' for layer in range(L)} <= tags and 'layers' not in tags
  assert [event.step for event in found.Tensors('eval/saturation')] == [2, 4]


def test_the_report_has_the_monitors(straight: Path) -> None:
  report = json.loads((straight / 'report.json').read_text())
  last = {
    name: value for row in rows(straight) if row['step'] == STEPS for name, value in row.items()
  }
  for name in ('perplexity', 'expert_usage', 'balance_score', 'max_vio'):
    assert report[name] == last[f'eval/{name}']
  assert report['stability'] == last['stability'] and report['loss_spikes'] == last['loss_spikes']
  shares = last['eval/saturation']
  assert report['saturation'] == pytest.approx(
    {step: np.mean(share) for step, share in shares.items()}
  )


def test_the_report_has_both_sides(straight: Path) -> None:
  sides = json.loads((straight / 'report.json').read_text())['sides']
  sums, _ = of_validation(STEPS)
  for task, nll, size in zip(('prose', 'code'), sums['task_nll'], (300, 600)):
    assert sides[task]['held_out'] == pytest.approx(nll / size / math.log(2))
  assert sides['prose']['low'] is None  # of three documents
  assert sides['code']['low'] < sides['code']['held_out'] < sides['code']['high']
  assert sides['prose']['training'] is None
  assert sides['code']['training'] == pytest.approx(2 / 3 / math.log(2))
  last = [row for row in rows(straight) if 'eval/bits_per_byte' in row][-1]
  assert last['eval/bits_per_byte_low'] < last['eval/bits_per_byte']
  parts = [row for row in rows(straight) if row['step'] < STEPS]
  assert not any('eval/bits_per_byte_low' in row for row in parts)  # of a part of the text


def test_every_step_of_the_last_tenth_has_its_losses(tmp_path: Path) -> None:
  run(tmp_path / 'run', 0, 40, steps=40, log_every=10)
  found = [row for row in rows(tmp_path / 'run') if 'nll' in row]
  assert [row['step'] for row in found] == [1, 10, 20, 30, 37, 38, 39, 40]
  assert set(found[4]) == {'step', 'nll', 'lm_loss/prose', 'lm_loss/code'}
  assert found[4]['nll'] == float(of_step(37)['nll'])


def test_a_resumed_journal_tells_the_same_story(straight: Path, tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  run(workdir, 0, 5)  # killed after step 5, and resumed from a checkpoint of step 3
  # As other validations would have left.
  shutil.copy(workdir / 'probes' / '2.npz', workdir / 'probes' / '5.npz')
  run(workdir, 3, STEPS)
  assert rows(workdir) == rows(straight)
  assert (
    json.loads((workdir / 'report.json').read_text())['saturation']
    == json.loads((straight / 'report.json').read_text())['saturation']
  )
  run(workdir, STEPS, STEPS)  # a finished run, again
  assert rows(workdir) == rows(straight)


def test_a_person_sees_the_noise_beside_max_vio(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  run(tmp_path / 'run', 0, STEPS)
  out = capsys.readouterr().out
  steps = re.findall(
    r'^step \d/6 .*sequence .*MaxVio \d\.\d\d \(noise \d\.\d\d\).*left$', out, re.MULTILINE
  )
  assert len(steps) == STEPS
  assert re.search(r'% of experts used, MaxVio \d\.\d\d \(noise', out)
  assert re.search(r'^monitors perplexity \d', out, re.MULTILINE)


class Terminal(io.StringIO):
  """A stdout that says that it is a terminal."""

  def isatty(self) -> bool:
    return True


def test_what_is_no_terminal_gets_plain_lines_whatever_the_environment_says(
  tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv('FORCE_COLOR', '1')
  run(tmp_path / 'run', 0, STEPS)
  out = capsys.readouterr().out
  assert '\x1b' not in out and '\r' not in out
  assert len(re.findall(r'^step \d/6  loss', out, re.MULTILINE)) == STEPS


def test_on_a_terminal_the_line_of_a_step_stays_above_the_live_one(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stdout', terminal)
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '200')
  run(tmp_path / 'run', 0, STEPS)
  lines = re.findall(r'step (\d)/6  loss [^\r\n]*left\s*\n', terminal.getvalue())
  assert lines == [str(step) for step in range(1, STEPS + 1)]
  assert '\x1b[2K' in terminal.getvalue()  # the live line was there, and is wiped
