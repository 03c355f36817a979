"""How long from `python train.py` to the end of the first step of the tiny config?

  python benchmarks/start_up.py [--rounds 3]

Cold: nothing in the cache folder, so the tokenizer is trained, the text tokenised and every program compiled. Warm: the
same command again. The clock runs from the start of the process to the line of step 1, which is printed when the step
is done.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TRAIN = Path(__file__).parents[1] / 'train.py'


def first_step(folder: Path, run: str) -> float:
  """Seconds to the first step of a new run whose caches lie in `folder`."""
  env = os.environ | {'XDG_CACHE_HOME': str(folder / 'cache'), 'PYTHONUNBUFFERED': '1'}
  command = [
    sys.executable,
    str(TRAIN),
    f'--workdir={folder / run}',
    '--config.steps=1',
    '--config.eval.batches=1',
  ]
  start = time.perf_counter()
  process = subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  for line in process.stdout:
    if line.startswith('step '):
      seconds = time.perf_counter() - start
      break
  else:
    raise SystemExit(f'no step was done:\n{process.communicate()[1]}')
  process.communicate()
  return seconds


def main() -> None:
  """Prints cold and warm seconds."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  times: dict[str, list[float]] = {'cold': [], 'warm': []}
  for _ in range(args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      for state, seconds in times.items():
        seconds.append(first_step(Path(folder), state))
  table = Table('python train.py to the end of step 1', 'seconds: median (least - most)')
  for state, seconds in times.items():
    table.add_row(
      state, f'{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})'
    )
  Console(width=110).print(table)


if __name__ == '__main__':
  main()
