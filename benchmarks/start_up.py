"""How long from `python train.py` to the end of the first step of the tiny config?

  python -m benchmarks.start_up [--rounds 3] [--quick]

Cold: nothing in the cache folder, so the tokenizer is trained, the text tokenised and every program
compiled. Warm: the same command again. The clock runs from the start of the process to the line of
step 1, which is printed when the step is done.
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
# A small model on a text without a tokenizer to be trained.
SMALLEST = (
  '--config.data.source=synthetic',
  '--config.data.tokenizer=bytes',
  '--config.data.synthetic_tokens=20000',
  '--config.model.num_layers=1',
  '--config.model.d_model=32',
  '--config.batch_size=8',
  '--config.seq_len=32',
)


def first_step(folder: Path, run: str, *flags: str) -> float:
  """Seconds to the first step of a new run whose caches lie in `folder`."""
  env = os.environ | {'XDG_CACHE_HOME': str(folder / 'cache'), 'PYTHONUNBUFFERED': '1'}
  command = [
    sys.executable,
    str(TRAIN),
    f'--workdir={folder / run}',
    '--config.steps=1',
    # What comes after the first step is not timed.
    '--config.eval.batches=1',
    '--config.eval.sample_tokens=0',
    *flags,
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
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  flags = SMALLEST if args.quick else ()
  times: dict[str, list[float]] = {'cold': [], 'warm': []}
  for _ in range(1 if args.quick else args.rounds):
    with tempfile.TemporaryDirectory() as folder:
      for state, seconds in times.items():
        seconds.append(first_step(Path(folder), state, *flags))
  table = Table('python train.py to the end of step 1', 'seconds: median (least - most)')
  for state, seconds in times.items():
    table.add_row(
      state, f'{statistics.median(seconds):.1f} ({min(seconds):.1f} - {max(seconds):.1f})'
    )
  Console(width=110).print(table)


if __name__ == '__main__':
  main()
