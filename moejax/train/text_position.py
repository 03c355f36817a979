"""The text of a run, and where it goes on in it: after the rows that it has seen, whatever its
batches were.

The stretches of a run lie in its directory, beside its config: the newest checkpoint alone does not
tell what batches the steps before it had.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from moejax.checkpoint.checkpoints import Restored
from moejax.config import ConfigError
from moejax.data.pipeline import Data, open_data
from moejax.data.position import Stretch, continued, rows_seen
from moejax.runtime.files import bad_file, read_json, write_whole
from moejax.runtime.multiprocess import check_alike, fail_together
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.run_dir import has_begun, starting_special_tokens
from moejax.train.initial_state import expect_same_tokenizer, model_fingerprint
from moejax.train.step.train_state import TrainState

BATCHES_FILE = 'batches.json'


def read_stretches(workdir: Path) -> list[Stretch]:
  """Returns the stretches of the run in a directory, [] where it tells of none.

  Raises:
    ConfigError: the file is not one of ours.
  """
  content = read_json(workdir, BATCHES_FILE)
  if not content:
    return []
  try:
    stretches = [Stretch(**stretch) for stretch in content['stretches']]
    for number in itertools.chain.from_iterable(stretches):
      # Steps and rows are computed from them; a bool is an int, and no count.
      if type(number) is not int or number < 0:
        raise TypeError(f'{number!r} is no count')
    return stretches
  except (KeyError, TypeError) as error:
    remedy = f'move it away, and the run counts all its steps as of one batch_size ({error!r})'
    raise bad_file(workdir / BATCHES_FILE, 'stretches', 'something else', remedy) from error


def agreed_stretches(workdir: Path) -> list[Stretch]:
  """As `read_stretches`, in all processes: on them hangs which rows each takes of a batch.

  Raises:
    ConfigError: in all processes, where one cannot read the file or finds another than the first.
  """
  with fail_together(ConfigError):
    stretches = read_stretches(workdir)
  check_alike(f'{BATCHES_FILE} of the run directory', repr(stretches))
  return stretches


def write_stretches(workdir: Path, stretches: tuple[Stretch, ...]) -> None:
  """Writes the stretches into the directory of their run."""
  content = {'stretches': [stretch._asdict() for stretch in stretches]}
  write_whole(workdir / BATCHES_FILE, json.dumps(content, indent=2) + '\n')


def stretches_after(
  before: list[Stretch], saved: dict[str, str], current: Stretch
) -> tuple[Stretch, ...]:
  """Returns the stretches of a run that goes on from a checkpoint.

  Args:
    before: those that its directory tells of.
    saved: the fingerprint of the checkpoint, which has the batch_size and seq_len of its step.
    current: of the steps from here on.
  """
  last = Stretch(0, int(saved['batch_size']), int(saved['seq_len']))
  earlier = [stretch for stretch in before if stretch.first_step < current.first_step]
  # A directory that tells nothing, or of another run: then all steps count as the last one did.
  is_told = bool(earlier) and earlier[-1][1:] == last[1:]
  return continued(earlier if is_told else [last], current)


def position_lines(stretches: tuple[Stretch, ...], step: int) -> list[str]:
  """Returns what to tell of the place in the text, where batches changed at this step; else []."""
  if len(stretches) < 2 or stretches[-1].first_step != step:
    return []
  previous, current = stretches[-2:]
  lines = [f'the text goes on after the {rows_seen(stretches, step)} rows that were seen']
  if previous.seq_len != current.seq_len:
    lines.append(
      f'rows of {current.seq_len} tokens have another order than those of {previous.seq_len}: in '
      'this epoch some text comes twice, and some does not'
    )
  return lines


def data_from_there(
  data: Data, cfg: ExperimentConfig, before: list[Stretch], restored: Restored[TrainState]
) -> Data:
  """The data, to go on after the rows that the run had seen at its checkpoint.

  before: what the run directory tells of its batches.
  """
  current = Stretch(restored.step, cfg.batch_size, cfg.seq_len)
  stretches = stretches_after(before, restored.meta.fingerprint, current)
  return dataclasses.replace(data, stretches=stretches)


def open_text(cfg: ExperimentConfig) -> Data:
  """The text of a run, with the fingerprint that its checkpoints carry.

  They are only restored for the same text and the same model.

  Raises:
    ConfigError: there is no such text, or its tokenizer is not that of the model to start from.
  """
  data = open_data(
    cfg.data,
    batch_size=cfg.batch_size,
    seq_len=cfg.seq_len,
    seed=cfg.seed,
    special=starting_special_tokens(cfg),
  )
  if cfg.init_from and not has_begun(cfg):
    expect_same_tokenizer(cfg, data.tokenizer)
  model = with_vocabulary(cfg, data.vocab_size).model
  return dataclasses.replace(data, fingerprint=data.fingerprint | model_fingerprint(model))
