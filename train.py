"""Trains a Mixture-of-Experts language model; the same command again goes on where it stopped.

  python train.py                                       configs/tiny.py: ten minutes on two CPU cores
  python train.py --config=FILE[:VARIANT] --workdir=DIR another experiment, its run in DIR
  python train.py --config.steps=100 --config.model.num_layers=2
  python train.py --coordinator=HOST:PORT --num_processes=N --process_id=I     one of N; on TPU and Slurm by itself

Exit status: 0 done, 2 bad config, 3 no checkpoint loads, 4 diverged, 5 run directory in use, 6 hung, 143 or 130 signal
"""
import os
import sys


def main(argv: list[str]) -> int:
  """Parses, then trains; returns the exit status."""
  from moejax import flags, launch
  from moejax.config import ConfigError
  from moejax.experiment import ExperimentConfig
  default = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configs', 'tiny.py')
  if {'-h', '--help'} & set(argv):
    print(f'{__doc__}\nEvery field of the config, as it stands in the file:\n'
          f'{flags.describe(argv, ExperimentConfig, default)}')
    return 0
  try:
    here, argv = launch.launched(argv)
    config = flags.parse(argv, ExperimentConfig, default)
    launch.connect(here)
  except ConfigError as error:
    print(f'train.py cannot start; mend this and try again:\n{error}', file=sys.stderr)
    return 2
  from moejax.trainer import train
  return train(config)


if __name__ == '__main__':
  # A step maps half a gigabyte anew; huge pages take 8 to 20% off it on CPU. glibc reads this at start only.
  if sys.platform == 'linux' and 'GLIBC_TUNABLES' not in os.environ:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
  sys.exit(main(sys.argv[1:]))
