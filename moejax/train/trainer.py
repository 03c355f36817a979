"""The trainer: the only place with side effects and time.

lock -> data -> mesh -> compile -> restore or initialise
-> for each step: batch, step, log, validate, save -> report
"""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from moejax.checkpoint.checkpoints import Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.fingerprint import changes
from moejax.checkpoint.lock import RunInUse, hold_run_directory
from moejax.checkpoint.manifest import digest
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError, check, problem_if
from moejax.data.batch import Batch
from moejax.runtime.command import usage_error
from moejax.runtime.faults import fault_point, parse_environment
from moejax.runtime.files import is_disk_error, write_whole
from moejax.runtime.lifecycle import configure_logging, end_at_once, keep_compiled_programs
from moejax.runtime.multiprocess import Vote, check_alike, fail_together, is_first_process
from moejax.runtime.signals import StopSignals, stop_signals
from moejax.runtime.steady_output import steady_output
from moejax.runtime.watchdog import beat, watch
from moejax.train.compile import compile_programs
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.run_dir import (
  CHECKPOINTS,
  TOKENIZER_FILE,
  read_config,
  write_config,
)
from moejax.train.experiment.summary import summarise, summary_lines
from moejax.train.initial_state import (
  initial_train_state,
)
from moejax.train.journal import open_journal
from moejax.train.run_parts import Run
from moejax.train.shapes import make_run_mesh, sharded_state_shapes
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import Metrics
from moejax.train.text_position import (
  agreed_stretches,
  data_from_there,
  open_text,
  position_lines,
  write_stretches,
)
from moejax.train.validation import validate


class Diverged(RuntimeError):
  """Too many steps in a row had a non-finite loss, gradient or update."""


EXIT_STATUS = {ConfigError: 2, NoLoadableCheckpoint: 3, Diverged: 4, RunInUse: 5}


def train(cfg: ExperimentConfig, *notes: str) -> int:
  """Trains, or goes on training, the run in cfg.workdir. Returns the exit status, see train.py.

  notes: lines that are told after the summary, before the first step.
  """
  keep_compiled_programs()
  with steady_output():
    return train_or_tell(cfg, notes)


def train_or_tell(cfg: ExperimentConfig, notes: Sequence[str]) -> int:
  """Does what `train` promises; foreseen errors are a line on stderr."""
  try:
    # A fault that cannot be is an error now, and not at the step that it was meant for.
    parse_environment()
    check(problem_if(not cfg.steps, 'steps=0 is of a model that is only read: use 1 or more'))
    with configure_logging(), contextlib.ExitStack() as held, stop_signals() as stop:
      # One process locks for all; where it cannot, no process goes on.
      with fail_together(RunInUse, ConfigError):
        if is_first_process():
          held.enter_context(hold_run_directory(cfg.workdir))
      return start(cfg, stop, notes)
  except tuple(EXIT_STATUS) as error:
    print(usage_error('moejax.train', error), file=sys.stderr)
    return EXIT_STATUS[type(error)]
  except Exception as error:
    end_at_once()
    if not is_disk_error(error):
      raise
    problem = f'{error}: make room or mend the disk, and give the same command again'
    print(usage_error('moejax.train', problem), file=sys.stderr)
    return 1


def start(cfg: ExperimentConfig, stop: StopSignals, notes: Sequence[str]) -> int:
  """Makes all parts of the run and trains it. The run directory is held.

  stop: the signals that come. notes: as of `train`. Returns the exit status.
  """
  workdir = pathlib.Path(cfg.workdir)
  # 1. The text, tokenised and cached; its tokenizer says how large the vocabulary is.
  with fail_together(ConfigError):
    data = open_text(cfg)
  full = with_vocabulary(cfg, data.vocab_size)
  # 2. All processes are to run the same programs on the same text. Paths are not compared: they may
  # have other names on other machines.
  check_alike('the config', repr(vars(cfg) | {'workdir': '', 'data': ''}))
  check_alike('the text or tokenizer', repr(sorted(data.fingerprint.items())))
  # 3. The devices, as a mesh that divides the batch and every parameter.
  mesh = make_run_mesh(full)
  with jax.set_mesh(mesh):
    # 4. What the directory holds is of this run: told before anything is compiled.
    checkpoints = Checkpoints(workdir / CHECKPOINTS, full.checkpoint)
    newest = checkpoints.expect_same_run(sharded_state_shapes(full, mesh), data.fingerprint)
    check(steps_behind(cfg, newest))
    # 5. The programs, before there is any array: what does not fit is known now.
    programs = compile_programs(full, mesh)
    # 6. The state: the newest checkpoint that verifies, or the state before the first step.
    stretches = agreed_stretches(workdir)
    restored = checkpoints.restore(programs.target, data.fingerprint)
    if restored:
      state = restored.tree
      data = data_from_there(data, full, stretches, restored)
    else:
      state = initial_train_state(full, programs.target, mesh)
    # 7. What others read of the run. What has changed in the config is told once the journal is
    # open, and found before the old config is written over.
    target, temporaries = programs.target, programs.temporaries
    summary = summarise(
      full, target.model, target.opt_state, mesh, data=data, temporaries=temporaries
    )
    changed = changes_of_config(cfg)
    if is_first_process():
      write_config(cfg)
      write_stretches(workdir, data.stretches)
      write_whole(workdir / TOKENIZER_FILE, data.tokenizer.json_text)
      data.tokenizer.special.save(workdir)
      write_whole(workdir / 'summary.json', json.dumps(summary, indent=2) + '\n')
    # 8. The steps, under a watch that ends a process that hangs.
    step = int(state.step)
    stacks = workdir / f'hang.{jax.process_index()}.txt'
    with (
      open_journal(full, data, summary['flops_per_token'], step) as journal,
      watch(full.hang_after, stacks),
    ):
      journal.say(*summary_lines(summary, full), *notes)
      if step:
        changed += position_lines(data.stretches, step)
        journal.say(f'resuming after step {step} of {workdir}', *changed)
      run = Run(full, data, programs, checkpoints, journal)
      vote = Vote(stop.received, mesh)
      # From here on a signal waits for the end of a step, and for a save.
      stop.has_unsaved = True
      return train_steps(run, state, vote)


def steps_behind(cfg: ExperimentConfig, newest: int) -> str:
  """The problem of a run that is to end before the newest step in its directory; '' if none."""
  return problem_if(
    newest > cfg.steps,
    f'steps={cfg.steps} is below step {newest}, which {cfg.workdir} has reached: use {newest} or '
    'more, or a new workdir',
  )


def changes_of_config(cfg: ExperimentConfig) -> list[str]:
  """How the config differs from the one that the run had last; [] where that cannot be read."""
  with contextlib.suppress(ConfigError):
    return [f'changed since: {line}' for line in changes(read_config(cfg.workdir), cfg)]
  return []


def train_steps(run: Run, state: TrainState, vote: Vote) -> int:
  """The steps from where the state stands. Returns the exit status.

  Metrics are read one step late, so that a device always has the next step to do.
  """
  cfg, programs = run.cfg, run.programs
  done = saved = int(state.step)
  unread: list[tuple[int, Metrics]] = []  # (step, metrics), of the newest step at most
  signal = vote.cast()
  while not signal and done < last_step(cfg):
    fault_point('step', done + 1)
    state, metrics = programs.train(state, next_batch(run, done, unread))
    # The step is only on its way; meanwhile, what the one before it measured.
    read_metrics(run, unread)
    done += 1
    unread.append((done, metrics))
    # The last step is validated and saved after the loop, with all of the held-out text.
    validating = cfg.eval.every and done % cfg.eval.every == 0 and done < cfg.steps
    at_checkpoint = done % cfg.checkpoint.every == 0
    if validating or at_checkpoint:
      read_metrics(run, unread)
      score = validate(run, state, cfg.eval.batches) if validating else math.inf
      if at_checkpoint and done < cfg.steps and save_checkpoint(run, done, state, score):
        saved = done
      run.journal.throughput.resume()
      beat()
    signal = vote.cast()
  read_metrics(run, unread)
  return finish(run, state, saved, signal)


def next_batch(run: Run, step: int, running: list[tuple[int, Metrics]]) -> Batch:
  """The batch of a step, on its way to the devices.

  It is made while the step before it runs: where that has ended first, devices had to wait.

  running: the step before it with its metrics, if one is on its way.
  """
  began = time.perf_counter()
  batch = run.programs.put(run.data.batch(step, run.programs.rows))
  if all(metrics['loss'].is_ready() for _, metrics in running):
    run.journal.throughput.add_wait(time.perf_counter() - began)
  return batch


def last_step(cfg: ExperimentConfig) -> int:
  """The step after which this process ends, be the run done or not."""
  return min(cfg.steps, cfg.stop_after or cfg.steps)


def read_metrics(run: Run, unread: list[tuple[int, Metrics]]) -> None:
  """Writes the metrics that were not read yet, waiting for their step, and takes them off the list.

  Raises:
    Diverged: too many steps in a row were skipped.
  """
  while unread:
    run.journal.step(*unread.pop())
    beat()
    note_failed_save(run)
    skips = run.journal.skips_in_a_row
    if skips >= run.cfg.stop_after_skips:
      # The save in flight would die with this process.
      note_failed_save(run, wait=True)
      raise Diverged(
        f'the last {skips} steps had no usable loss or gradient and were skipped: lower '
        'optim.learning_rate, look at the data of these steps, or raise optim.skip_spikes'
      )


def finish(run: Run, state: TrainState, saved: int, signal: int) -> int:
  """Ends the loop: the last validation, the last save and the report. Returns the exit status.

  Args:
    saved: the newest step that was saved.
    signal: the signal that ended the loop; 0: none did.
  """
  cfg, done = run.cfg, int(state.step)
  is_early = bool(signal) or last_step(cfg) < cfg.steps
  score = math.inf if is_early else validate(run, state, 0)
  is_saved = saved >= done or save_checkpoint(run, done, state, score)
  # Now that nothing is left to do, also of a save that is still in flight.
  if note_failed_save(run, wait=True) or not is_saved:
    run.journal.say(
      f'the last save failed: give the same command again when {cfg.workdir} can be written to'
    )
    return 1
  run.checkpoints.close()
  if is_early:
    why = f'by signal {signal}' if signal else 'by stop_after'
    run.journal.say(
      f'stopped {why} after step {done} of {cfg.steps}, saved; the same command goes on from here'
    )
    return 128 + signal if signal else 0
  run.journal.report(digest(state), score)
  return 0


def save_checkpoint(run: Run, step: int, state: TrainState, score: float) -> bool:
  """Starts a save. Returns whether that went well: if not, training goes on, and the next may.

  score: bits per byte of the held-out text, by which the best is kept; inf: not measured.
  """
  beat('save')
  # One save at a time.
  note_failed_save(run, wait=True)
  try:
    run.checkpoints.save(step, state, run.data.fingerprint, score)
  except SaveFailed as error:
    run.journal.save_failed(error.step, f'training goes on: {error}')
    return False
  return True


def note_failed_save(run: Run, wait: bool = False) -> bool:
  """Says so if the last save did not reach the disk; returns whether that is so."""
  try:
    run.checkpoints.check(wait)
  except SaveFailed as error:
    run.journal.save_failed(error.step, f'training goes on: {error}')
    return True
  return False
