"""Says what a run would take on other chips: memory, communication, the least time of a step.

  moejax plan --topology=v5p:8x8x8 --config=FILE[:VARIANT] --config.steps=100
  moejax plan --plan=fit --topology=h200:256 --config=FILE       looks for a mesh that fits
  moejax plan --topology=h200:8 --config=RUN_DIR                 a run; of an import, the next

Topologies are v5p:8x8x8 (TPU v4, v5p and tpu7x by three sizes, v5e:8x8 and v6e:16x16 by two),
h200:256 (GPUs by their number) and cpu:512 (virtual devices). No accelerator is needed, nothing is
allocated and no data is read. `moejax train --plan` is the same command.

Exit: 0 it fits, 2 it does not, or bad config
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moejax.config import ConfigError
from moejax.plan.topology import read_plan_flags
from moejax.runtime.command import run_quietly, usage_error

if TYPE_CHECKING:  # nothing here may import jax before the environment is set
  from ml_collections import ConfigDict


def main(argv: Sequence[str]) -> int:
  """Parses and plans; returns the exit status."""
  if {'-h', '--help'} & set(argv):
    print(__doc__)
    print('moejax train --help lists every field of the config.')
    return 0
  flags = [arg.partition('=')[0] for arg in argv]
  try:
    # First of all: it sets what JAX reads when it is imported.
    mode, topology, rest = read_plan_flags(['--plan'] * ('--plan' not in flags) + [*argv])
    from moejax.config.flags import parse_flags
    from moejax.train.experiment.config import DEFAULT_CONFIG, ExperimentConfig

    cfg = parse_flags(rest, ExperimentConfig, DEFAULT_CONFIG, config_to_plan)
  except ConfigError as error:
    print(usage_error('moejax.plan', error), file=sys.stderr)
    return 2
  from moejax.plan.planner import print_plan

  return print_plan(cfg, mode, topology)


def config_to_plan(directory: str, is_source: bool) -> 'ConfigDict':
  """The config of a run, or of the one that would start from it; see `config_from_run`.

  A plan writes nothing: a new run needs no directory of its own for it.
  """
  from moejax.train.experiment.run_dir import config_from_run

  config = config_from_run(directory, is_source)
  config.workdir = config.workdir or directory
  return config


if __name__ == '__main__':
  sys.exit(run_quietly(main, sys.argv[1:]))
