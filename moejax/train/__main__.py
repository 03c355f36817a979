"""Trains a Mixture-of-Experts language model; the same command again goes on where it stopped.

  moejax train                                          configs/tiny.py: ten minutes on two CPU \
cores
  moejax train --config=FILE[:VARIANT] --workdir=DIR --config.steps=100 \
    another experiment, its run in DIR
  moejax train --config=RUN_DIR                         goes on with that run; with the model of \
an import, --workdir=DIR
  moejax train --config.init_from=RUN_DIR --workdir=DIR \
    a new run from the model of that one, with its config
  moejax train --plan --topology=v5p:8x8x8              what that would take there; --plan=fit \
looks for a mesh
  moejax train --coordinator=HOST:PORT --num_processes=N --process_id=I \
    one of N; on TPU and Slurm by itself

FILE may be the name of a file in configs/, as tiny. `python train.py` and `python -m moejax train`
are the same command.

Exit: 0 done, 1 last save failed or disk full, 2 bad config, no fit, 3 no checkpoint loads, \
4 diverged, 5 in use, 6 hung, 128+signal
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moejax.runtime.command import run_quietly, usage_error
from moejax.runtime.signals import stop_signals

if TYPE_CHECKING:
  from moejax.train.experiment.config import ExperimentConfig


def main(argv: Sequence[str], note: Callable[['ExperimentConfig'], str] | None = None) -> int:
  """Parses, then trains; returns the exit status. Plans are another command's, see plan.

  note: makes of the config a line that is told before the first step.
  """
  # First of all: importing what is imported below takes seconds, in which a signal is heard.
  with stop_signals():
    return parse_and_train(list(argv), note)


def parse_and_train(argv: list[str], note: Callable[['ExperimentConfig'], str] | None) -> int:
  """Does what `main` promises, in a process that hears signals."""
  from moejax.config import ConfigError
  from moejax.config.flags import describe, parse_flags
  from moejax.runtime.launch import connect, read_launch_flags
  from moejax.train.experiment.config import DEFAULT_CONFIG, ExperimentConfig
  from moejax.train.experiment.run_dir import config_from_run

  if {'-h', '--help'} & set(argv):
    print(__doc__)
    print('Every field of the config, as it stands in the file:')
    print(describe(argv, ExperimentConfig, DEFAULT_CONFIG, config_from_run))
    return 0
  try:
    launch, argv = read_launch_flags(argv)
    cfg = parse_flags(argv, ExperimentConfig, DEFAULT_CONFIG, config_from_run)
    connect(launch)
  except ConfigError as error:
    print(usage_error('moejax.train', error), file=sys.stderr)
    return 2
  from moejax.train.trainer import train

  return train(cfg, note(cfg)) if note else train(cfg)


def start_again_with_huge_pages() -> None:
  """Starts this process again, once, where glibc is to use huge pages; its id stays the same.

  A step maps half a gigabyte anew; huge pages take 8 to 20% off it on CPU. glibc reads this at
  start only.
  """
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == '__main__':
  start_again_with_huge_pages()
  sys.exit(run_quietly(main, sys.argv[1:]))
