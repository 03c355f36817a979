"""The loop: the only place with side effects and time.

lock -> data -> mesh -> compile -> restore or initialise -> for each step: batch, step, log, validate, save -> report
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys

import jax

from moejax.checkpoint.checkpoints import Checkpoints, NoLoadableCheckpoint
from moejax.checkpoint.fingerprint import changes
from moejax.checkpoint.lock import RunInUse, hold_run_directory
from moejax.checkpoint.manifest import digest
from moejax.checkpoint.writer import SaveFailed
from moejax.config import ConfigError
from moejax.data.pipeline import Data, open_data
from moejax.runtime.faults import fault_point, parse_environment
from moejax.runtime.files import write_whole
from moejax.runtime.lifecycle import (
  configure_logging,
  end_at_once,
  keep_compiled_programs,
  stop_signals,
)
from moejax.runtime.multiprocess import Vote, check_alike, fail_together, is_first_process
from moejax.runtime.watchdog import beat, watch
from moejax.train.compile import Programs, compile_programs
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.run_dir import CHECKPOINTS, TOKENIZER_FILE, read_config, write_config
from moejax.train.experiment.summary import lines, summarise
from moejax.train.initial_state import initial_train_state, model_fingerprint
from moejax.train.journal import Journal, NullJournal, open_journal
from moejax.train.shapes import make_run_mesh
from moejax.train.step.train_state import TrainState
from moejax.train.step.train_step import Metrics
from moejax.train.validation import validate


class Diverged(RuntimeError):
  """Too many steps in a row had a non-finite loss or gradient."""


EXIT_STATUS = {ConfigError: 2, NoLoadableCheckpoint: 3, Diverged: 4, RunInUse: 5}


def train(cfg: ExperimentConfig) -> int:
  """Trains, or goes on training, the run in cfg.workdir. Returns the exit status, see train.py."""
  keep_compiled_programs()
  try:
    parse_environment()
    with configure_logging(), contextlib.ExitStack() as held, stop_signals() as received:
      with fail_together(RunInUse, ConfigError):
        if is_first_process():
          held.enter_context(hold_run_directory(cfg.workdir))
      return run(cfg, received)
  except tuple(EXIT_STATUS) as error:
    print(f'{type(error).__name__}: {error}', file=sys.stderr)
    return EXIT_STATUS[type(error)]
  except Exception:
    end_at_once()
    raise


def run(cfg: ExperimentConfig, received: list[int]) -> int:
  """Everything between holding the run directory and letting it go."""
  workdir = pathlib.Path(cfg.workdir)
  with fail_together(ConfigError):
    data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=cfg.seed)
    full = with_vocabulary(cfg, data.vocab_size)
  data = dataclasses.replace(data, fingerprint=data.fingerprint | model_fingerprint(full.model))
  check_alike(
    'the config', repr(vars(cfg) | {'workdir': '', 'data': ''})
  )  # paths may have other names on other machines
  check_alike('the text or tokenizer', repr(sorted(data.fingerprint.items())))
  mesh = make_run_mesh(full)
  with jax.set_mesh(mesh):
    programs = compile_programs(full, mesh)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, full.checkpoint)
    state = restored(programs.target, checkpoints, data) or initial_train_state(
      full, programs.target, mesh
    )
    about = summarise(
      full, programs.target.model, programs.target.opt_state, mesh, data, programs.temporaries
    )
    changed = changed_since(cfg)
    if is_first_process():
      write_config(cfg)
      write_whole(workdir / TOKENIZER_FILE, data.tokenizer.json_text)
      write_whole(workdir / 'summary.json', json.dumps(about, indent=2) + '\n')
    with (
      open_journal(full, data, about['flops_per_token'], int(state.step)) as journal,
      watch(full.hang_after, workdir / f'hang.{jax.process_index()}.txt'),
    ):
      journal.say(*lines(about, full))
      if int(state.step):
        journal.say(f'resuming after step {int(state.step)} of {workdir}', *changed)
      return loop(full, data, programs, checkpoints, state, journal, Vote(received, mesh))


def loop(
  cfg: ExperimentConfig,
  data: Data,
  programs: Programs,
  checkpoints: Checkpoints,
  state: TrainState,
  journal: Journal | NullJournal,
  vote: Vote,
) -> int:
  """The steps. Metrics are read one step late, so that a device always has the next step to do."""
  done = saved = int(state.step)
  late: list[tuple[int, Metrics]] = []

  def catch_up() -> None:
    while late:
      journal.step(*late.pop())
      beat()
      note_failed_save(checkpoints, journal)
      if journal.skips_in_a_row >= cfg.stop_after_skips:
        note_failed_save(
          checkpoints, journal, wait=True
        )  # the one in flight would die with this process
        raise Diverged(
          f'the last {journal.skips_in_a_row} steps had no usable loss or gradient and were skipped: '
          'lower optim.learning_rate, look at the data of these steps, or raise optim.skip_spikes'
        )

  end = min(cfg.steps, cfg.stop_after or cfg.steps)
  while not (signal := vote.cast()) and done < end:
    fault_point('step', done + 1)
    state, metrics = programs.train(state, programs.put(data.batch(done, programs.rows)))
    catch_up()
    done += 1
    late.append((done, metrics))
    validating = cfg.eval.every and done % cfg.eval.every == 0 and done < cfg.steps
    if validating or done % cfg.checkpoint.every == 0:
      catch_up()
      score = (
        validate(cfg, data, programs, state, journal, cfg.eval.batches) if validating else math.inf
      )
      if done < cfg.steps and done % cfg.checkpoint.every == 0:
        saved = save_checkpoint(checkpoints, done, state, data, score, journal) or saved
      journal.resume_clock()
      beat()
  catch_up()
  early = signal or end < cfg.steps
  final = math.inf if early else validate(cfg, data, programs, state, journal, 0)
  unsaved = saved < done and not save_checkpoint(checkpoints, done, state, data, final, journal)
  if note_failed_save(checkpoints, journal, wait=True) or unsaved:
    journal.say(
      f'the last save failed: give the same command again when {cfg.workdir} can be written to'
    )
    return 1
  checkpoints.close()
  if early:
    why = f'by signal {signal}' if signal else 'by stop_after'
    journal.say(
      f'stopped {why} after step {done} of {cfg.steps}, saved; the same command goes on from here'
    )
    return 128 + signal if signal else 0
  journal.report(digest(state), final)
  return 0


def save_checkpoint(
  checkpoints: Checkpoints,
  step: int,
  state: TrainState,
  data: Data,
  score: float,
  journal: Journal | NullJournal,
) -> int:
  """Starts a save. Returns the step, or 0 when that did not go well: training goes on, and the next may."""
  beat('save')
  note_failed_save(checkpoints, journal, wait=True)
  try:
    checkpoints.save(step, state, data.fingerprint, score)
  except SaveFailed as error:
    journal.save_failed(error.step, f'training goes on: {error}')
    return 0
  return step


def note_failed_save(
  checkpoints: Checkpoints, journal: Journal | NullJournal, wait: bool = False
) -> bool:
  """Says so if the last save did not reach the disk; returns whether that is so."""
  try:
    checkpoints.check(wait)
  except SaveFailed as error:
    journal.save_failed(error.step, f'training goes on: {error}')
    return True
  return False


def changed_since(cfg: ExperimentConfig) -> list[str]:
  """How the config differs from the one that the run had last; nothing where that cannot be read."""
  with contextlib.suppress(ConfigError):
    return [f'changed since: {line}' for line in changes(read_config(cfg.workdir), cfg)]
  return []


def restored(target: TrainState, checkpoints: Checkpoints, data: Data) -> TrainState | None:
  """The newest verified state of the run directory, if it holds any."""
  found = checkpoints.restore(target, data.fingerprint)
  return found[1] if found else None
