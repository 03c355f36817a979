"""Trains a Mixture-of-Experts language model; the same command again goes on where it stopped.

  python train.py                                       configs/tiny.py: ten minutes on two CPU \
cores
  python train.py --config=FILE[:VARIANT] --workdir=DIR --config.steps=100 \
    another experiment, its run in DIR
  python train.py --config=RUN_DIR                      goes on with that run; with the model of \
an import, --workdir=DIR
  python train.py --config.init_from=RUN_DIR --workdir=DIR \
    a new run from the model of that one, with its config
  python train.py --plan --topology=v5p:8x8x8           what that would take there; --plan=fit \
looks for a mesh
  python train.py --coordinator=HOST:PORT --num_processes=N --process_id=I \
    one of N; on TPU and Slurm by itself

Exit: 0 done, 1 last save failed, 2 bad config, no fit, 3 no checkpoint loads, 4 diverged, \
5 in use, 6 hung, 128+signal
"""

import os
import sys

DEFAULT_CONFIG = os.path.join(os.path.dirname(__file__), 'configs/tiny.py')


def main(argv: list[str]) -> int:
  """Parses, then trains, or plans; returns the exit status."""
  from moejax.config import ConfigError
  from moejax.plan.topology import read_plan_flags

  try:
    # First of all: it sets what JAX reads when it is imported.
    mode, topology, argv = read_plan_flags(argv)
    from moejax.config.flags import describe, parse_flags
    from moejax.runtime.launch import connect, read_launch_flags
    from moejax.train.experiment.config import ExperimentConfig
    from moejax.train.experiment.run_dir import config_from_run

    if {'-h', '--help'} & set(argv):
      print(__doc__)
      print('Every field of the config, as it stands in the file:')
      print(describe(argv, ExperimentConfig, DEFAULT_CONFIG, config_from_run))
      return 0
    launch, argv = read_launch_flags(argv)
    cfg = parse_flags(argv, ExperimentConfig, DEFAULT_CONFIG, config_from_run)
    if not topology:
      connect(launch)
  except ConfigError as error:
    print(f'train.py cannot start; mend this and try again:\n{error}', file=sys.stderr)
    return 2
  if topology:
    from moejax.plan.planner import print_plan

    return print_plan(cfg, mode, topology)
  from moejax.hf.spelling import export_outlook
  from moejax.train.trainer import train

  return train(cfg, export_outlook(cfg))


if __name__ == '__main__':
  # A step maps half a gigabyte anew; huge pages take 8 to 20% off it on CPU. glibc reads this
  # at start only.
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  sys.exit(main(sys.argv[1:]))
