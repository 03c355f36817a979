"""Faults on purpose, in real processes: what a run survives, and with which exit status it ends
when it does not."""

import ast
import json
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.checkpoint.manifest import unseal
from moejax.config import ConfigError
from moejax.runtime.faults import ACTIONS, NUMBERS, POINTS, SPOILS, parse_faults
from moejax.runtime.watchdog import HANG
from moejax.train import __main__ as command
from moejax.train.trainer import EXIT_STATUS
from tests.support.fault_rows import ROWS
from tests.support.tiny_run import ROOT, final_digest, rows
from tests.support.trainer_process import FEW, ONE_LAYER, PATIENCE, spawn, train_command, wait_for

SEED = 5
STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
  """A trainer that a failed test left would go on for hours."""
  yield
  for process in STARTED:
    process.kill()
  STARTED.clear()


def run(workdir: Path, fault: str = '', **changes: object) -> subprocess.Popen:
  """Starts a trainer with a fault. `steps` are those of FEW where they can be: one compiled program
  then serves nearly all."""
  workdir.parent.mkdir(exist_ok=True)
  common = ONE_LAYER | {'steps': FEW['steps'], 'log_every': 1, 'eval__every': 0}
  STARTED.append(spawn(train_command(workdir, **common | changes), MOEJAX_FAULT=fault))
  return STARTED[-1]


def ended(process: subprocess.Popen, status: int) -> str:
  """What the process said, once it has ended so."""
  output = process.communicate(timeout=PATIENCE)[0]
  assert process.returncode == status, output
  assert 'Traceback' not in output, output
  return output


def saved(workdir: Path) -> list[int]:
  return sorted(
    int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdecimal()
  )


def test_a_fault_is_read_or_refused() -> None:
  assert parse_faults('') == {} and parse_faults('kill@save:3,nan@loss:5') == {
    ('save', 3): 'kill',
    ('loss', 5): 'nan',
  }
  for bad in (
    'kill@save',
    'kill@nowhere:1',
    'kil@save:1',
    'kill@save:x',
    'nan@save:1',
    'kill@loss:1',
    'kill@save:1;x',
  ):
    with pytest.raises(ConfigError, match='give ACTION@POINT:N, such as kill@save:3') as caught:
      parse_faults(bad)
    assert all(name in str(caught.value) for name in (*ACTIONS, *POINTS, *SPOILS, *NUMBERS))


def test_the_table_names_tests_that_there_are() -> None:
  found = {
    f'{path.relative_to(ROOT)}::{node.name}'
    for path in (ROOT / 'tests').rglob('test_*.py')
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
  }
  named = [name for row in ROWS for name in row.nodes()]
  assert {*named} <= found, {*named} - found


def test_exit_statuses_are_told() -> None:
  for status in {*range(7), *EXIT_STATUS.values(), HANG}:
    assert re.search(rf'\b{status} \w', command.__doc__), status
  assert '128+signal' in command.__doc__ and (*EXIT_STATUS.values(), HANG) == (2, 3, 4, 5, 6)


@pytest.mark.slow
def test_a_fault_that_says_nothing_is_a_bad_config(tmp_path: Path) -> None:
  output = ended(run(tmp_path / 'run', 'kill@save'), 2)
  assert (
    "MOEJAX_FAULT='kill@save': give ACTION@POINT:N" in output and not (tmp_path / 'run').exists()
  )


@pytest.mark.slow
def test_bad_steps_are_skipped_and_a_bad_validation_is_never_the_best(tmp_path: Path) -> None:
  """NaN and inf in loss and gradient, spikes of both, a NaN validation: one run, with every step's
  digests kept."""
  workdir, bad = tmp_path / 'run', [2, 4, 27, 30]
  process = run(
    workdir,
    'nan@loss:2,inf@gradient:4,spike@loss:27,spike@gradient:30,nan@validation:16',
    steps=32,
    optim__skip_spikes=8.0,
    eval__every=8,
    checkpoint__every=1,
    checkpoint__keep_latest=40,
  )
  output = ended(process, 0)
  assert re.findall(r'^step (\d+) skipped: loss .* \(1 in a row\)$', output, re.MULTILINE) == [
    *map(str, bad)
  ]
  home = workdir / 'checkpoints'
  metas = {
    step: unseal((home / str(step) / 'meta' / 'metadata').read_text()) for step in range(1, 33)
  }
  for step in range(2, 33):
    now, before = metas[step].digests, metas[step - 1].digests
    changed = {path.split('/')[0] for path in now if now[path] != before[path]}
    spike = {'stability'} if step in (27, 30) else set()
    assert changed == (
      {'step'} | spike if step in bad else {'step', 'model', 'opt_state', 'router', 'stability'}
    ), step
  told = {row['step']: row for row in rows(workdir) if 'loss' in row}
  assert [step for step in told if told[step]['skipped']] == bad and told[32][
    'skipped_total'
  ] == len(bad)
  assert told[2]['loss'] is None and told[4]['grad_norm'] is None and told[27]['loss_spike'] == 1
  report = json.loads((workdir / 'report.json').read_text(), parse_constant=pytest.fail)
  assert report['not_finite'] == [16] and report['bits_per_byte'] > 0
  assert 'validation after step 16 was not finite: never the best' in output
  assert not metas[16].metric < float('inf')
  assert report['best_bits_per_byte'] == min(metas[step].metric for step in (8, 24, 32))


@pytest.mark.slow
def test_a_bad_best_does_not_push_out_a_good_one(tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  output = ended(
    run(
      workdir,
      'nan@validation:8,nan@validation:24',
      eval__every=8,
      checkpoint__every=8,
      checkpoint__keep_latest=1,
    ),
    0,
  )
  assert saved(workdir) == [16, 24] and output.count('not finite: never the best') == 2
  report = json.loads((workdir / 'report.json').read_text(), parse_constant=pytest.fail)
  assert (
    report['not_finite'] == [8, 24]
    and report['bits_per_byte'] is None
    and report['best_bits_per_byte'] > 0
  )


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
  process = run(
    tmp_path / 'run', 'nan@loss:2,nan@loss:4,inf@gradient:5,nan@gradient:6', stop_after_skips=3
  )
  output = ended(process, 4)
  assert (
    'the last 3 steps had no usable loss or gradient and were skipped: lower optim.learning_rate'
    in output
  )
  assert 'step 6 skipped' in output and 'step 7' not in output


@pytest.mark.slow
def test_a_hang_is_told_with_all_stacks(tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  output = ended(run(workdir, 'hang@step:6', hang_after=2.0), 6)
  assert 'Hang: no step, no batch of a validation and no save for 2 s (hang_after)' in output
  stacks = (workdir / 'hang.0.txt').read_text()
  assert all(re.search(r'faults\.py", line \d+ in fault_point', text) for text in (stacks, output))
  assert saved(workdir) == [4]


@pytest.mark.slow
def test_logs_on_a_full_disk_cost_lines_and_nothing_else(tmp_path: Path) -> None:
  """Three pieces a step: metrics.jsonl, load.jsonl, TensorBoard. Those of steps 2 and 3 find no
  room."""
  workdir, steps = tmp_path / 'run', FEW['steps']
  output = ended(run(workdir, ','.join(f'full@log:{n}' for n in range(4, 10))), 0)
  assert (
    output.count('No space left on device: training goes on') == 1
    and output.count('there is room again') == 1
  )
  kept = [1, *range(4, steps + 1)]
  assert [row['step'] for row in rows(workdir) if 'loss' in row] == kept
  loads = map(json.loads, (workdir / 'load.jsonl').read_text().splitlines())
  assert [line['step'] for line in loads] == kept
  assert all(f'step {step:2}/{steps}  loss' in output for step in range(1, steps + 1))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_within_a_step(tmp_path: Path, number: signal.Signals) -> None:
  workdir = tmp_path / 'run'
  process = run(workdir, steps=100_000, checkpoint__every=100_000)
  wait_for(process, workdir, 3)
  process.send_signal(number)
  output = ended(process, 128 + number)
  stopped = int(output.split(' after step ')[1].split()[0])
  assert (
    saved(workdir) == [stopped]
    and f'stopped by signal {int(number)} after step {stopped} of' in output
  )
  told = [row['step'] for row in rows(workdir)]
  assert told == [*range(1, stopped + 1)]


@pytest.mark.slow
def test_a_closed_stdout_ends_no_run(tmp_path: Path) -> None:
  workdir = tmp_path / 'run'
  process = run(workdir)
  wait_for(process, workdir, 1)
  process.stdout.close()  # stderr's, too: there is nowhere to say so
  assert process.wait(timeout=PATIENCE) == 0
  steps = FEW['steps']
  assert [row['step'] for row in rows(workdir) if 'loss' in row] == [*range(1, steps + 1)]
  assert max(saved(workdir)) == steps and final_digest(workdir)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
  """The second one comes while the first one's save is in flight."""
  output = ended(run(tmp_path / 'run', 'term@step:3,term@save:1', checkpoint__every=100), 143)
  assert 'stopped' not in output and 'step  3/24' in output and 'step  4/24' not in output


@pytest.mark.slow
def test_a_soak_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
  """300 steps with nine faults, and 300 without any: the same metrics and the same digest, to the
  bit. Kills come at random steps, while a save is in flight, before it has its name, and while an
  old step is deleted."""
  few = {'steps': 300, 'log_every': 5, 'eval__every': 100, 'checkpoint__every': 10}
  whole, workdir = tmp_path / 'whole' / 'run', tmp_path / 'soak' / 'run'
  reference = run(whole, **few)
  rng = random.Random(SEED)
  ends = [('kill', 'step')] * 2 + [('term', 'step')]
  ends += [('kill', 'save'), ('kill', 'commit'), ('kill', 'delete')]
  rng.shuffle(ends)
  left = set()  # what a kill has left beside whole steps
  full = rng.sample(range(len(ends)), 3)  # before these ends a save finds the disk full, too
  for i, (action, point) in enumerate(ends):
    newest = max(saved(workdir), default=0) if (workdir / 'checkpoints').exists() else 0
    at = newest + rng.randrange(15, 40) if point == 'step' else rng.randrange(2, 4)
    fault = f'{action}@{point}:{at}' + (',full@save:1' if i in full else '')
    print(f'seed {SEED}, from step {newest}: {fault}')
    process = run(workdir, fault, **few)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == (-9 if action == 'kill' else 143), output
    assert ('No space left' in output) == (i in full), output
    names = [path.name for path in (workdir / 'checkpoints').iterdir()]
    left |= {name.partition('.')[2] for name in names}
  assert {'orbax-checkpoint-tmp', 'deleted'} <= left  # it was hit where it hurts
  final = ended(run(workdir, **few), 0)
  ended(reference, 0)
  assert 'resuming after step ' in final and final_digest(workdir) == final_digest(whole)
  assert [row for row in rows(workdir) if 'saves_failed' not in row] == rows(whole)
  assert not [path for path in (workdir / 'checkpoints').iterdir() if not path.name.isdecimal()]
