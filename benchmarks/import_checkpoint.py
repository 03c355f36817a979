"""How long do an import of 2 GB and its export take, and how much memory beside the result?

  python -m benchmarks.import_checkpoint [--gigabytes=2.1 --dtype=float32 --directory=DIR] [--quick]

A Mixtral of random bfloat16 weights is written in shards to a temporary directory, imported there
and exported again, each by a process of its own, as `python -m moejax.hf` does. The import is in
float32, twice the size, unless --dtype says otherwise. The files have just been written, so that
reading them may be copying from memory; threads share it, and their seconds add up.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from moejax.checkpoint import checkpoints as checkpoint
from moejax.families import FAMILIES, config_json
from moejax.families.schema.tensor_names import file_shapes, leaves, tensors
from moejax.hf import export_model, import_model
from moejax.hf import logits as opened
from moejax.hf.safetensors.directory import Tensors, write_tensors
from moejax.hf.safetensors.file import DTYPES, MODEL_DTYPES, Spec

KNOWN = FAMILIES['mixtral']
SHARD_BYTES = 400_000_000
POOL = 1 << 24  # random numbers, which all tensors are pieces of


class Width(NamedTuple):
  """How wide the model is. The default is an eighth of the real one."""

  d_model: int = 1024
  d_expert: int = 3584
  vocab_size: int = KNOWN.presets['full'].vocab_size


SMALLEST = Width(64, 64, 256)


def write_model(directory: Path, num_bytes: float, width: Width) -> int:
  """Writes a model of about so many bytes, in whole layers. Returns how many they are."""
  full = KNOWN.presets['full']
  cfg = dataclasses.replace(
    full,
    d_model=width.d_model,
    vocab_size=width.vocab_size,
    num_layers=1,
    attention=dataclasses.replace(full.attention, num_heads=8, num_kv_heads=2),
    moe=dataclasses.replace(full.moe, d_expert=width.d_expert),
  )

  def published(num_layers: int) -> tuple[dict[str, object], dict[str, tuple[int, ...]], int]:
    sized = dataclasses.replace(cfg, num_layers=num_layers)
    config = config_json(KNOWN, sized, {'torch_dtype': 'bfloat16'})
    shapes = file_shapes(tensors(KNOWN.names, sized, config, leaves(sized)))
    return config, shapes, 2 * sum(int(np.prod(shape)) for shape in shapes.values())

  one, two = (published(n)[2] for n in (1, 2))
  config, shapes, total = published(max(1, round((num_bytes - one) / (two - one)) + 1))
  rng = np.random.default_rng(0)
  pool = (0.02 * rng.standard_normal(POOL, np.float32)).astype(ml_dtypes.bfloat16)

  def piece(shape: tuple[int, ...]) -> np.ndarray:
    return np.resize(pool[rng.integers(POOL // 2) :], shape)

  specs = [
    Spec(name, shape, 'BF16', lambda shape=shape: piece(shape)) for name, shape in shapes.items()
  ]
  write_tensors(directory, specs, {'config.json': json.dumps(config)}, SHARD_BYTES)
  return total


def timed(spent: dict[str, float], name: str, call: Callable) -> Callable:
  """The same function, which also adds the seconds that it takes to `spent`."""

  def timing(*args: object, **kwargs: object) -> object:
    start = time.perf_counter()
    try:
      return call(*args, **kwargs)
    finally:
      spent[name] += time.perf_counter() - start

  return timing


def measured_import(source: str, out: str, dtype: str) -> dict[str, float]:
  """Seconds of each part, and bytes of memory at the peak and before."""
  spent = dict.fromkeys(('read', 'load', 'digest', 'save', 'all'), 0.0)
  Tensors.read = timed(spent, 'read', Tensors.read)
  opened.read_weights = timed(spent, 'load', opened.read_weights)
  checkpoint.digests = timed(spent, 'digest', checkpoint.digests)
  for name in ('save', 'close'):
    setattr(
      checkpoint.Checkpoints, name, timed(spent, 'save', getattr(checkpoint.Checkpoints, name))
    )
  before = memory('VmRSS')
  timed(spent, 'all', import_model.import_model)(source, out, dtype=dtype)
  return spent | {'peak': memory('VmHWM'), 'before': before}


def measured_export(workdir: str, out: str, dtype: str) -> dict[str, float]:
  """Seconds of all, and bytes of memory at the peak and before."""
  spent, before = {'all': 0.0}, memory('VmRSS')
  timed(spent, 'all', export_model.export_model)(workdir, out, dtype=dtype)
  return spent | {'peak': memory('VmHWM'), 'before': before}


MEASURED = {'import': measured_import, 'export': measured_export}


class Measured(NamedTuple):
  """What a command took."""

  seconds: float  # of the whole process
  found: dict[str, float]  # from a row of MEASURED


def in_a_process(command: str, source: Path, out: Path, dtype: str) -> Measured:
  """Runs a row of MEASURED in a process of its own."""
  start = time.perf_counter()
  child = subprocess.run(
    [sys.executable, '-m', 'benchmarks.import_checkpoint', '--child', command, source, out, dtype],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return Measured(time.perf_counter() - start, json.loads(child.stdout))


def memory(name: str) -> int:
  """Bytes of this process by a row of /proc/self/status."""
  lines = Path('/proc/self/status').read_text().split('\n')
  [line] = [line for line in lines if line.startswith(name)]
  return int(line.split()[1]) * 1024


def main() -> None:
  """Writes, imports, exports, prints, and removes what was written."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--gigabytes', type=float, default=2.1)
  parser.add_argument('--dtype', choices=[*MODEL_DTYPES], default='float32', help='of the import')
  parser.add_argument(
    '--directory', help="where to write; the system's place for temporary files without it"
  )
  parser.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  if args.child:
    command, *paths_and_dtype = args.child
    print(json.dumps(MEASURED[command](*paths_and_dtype)))
    return
  size = 1e6 if args.quick else args.gigabytes * 1e9
  with tempfile.TemporaryDirectory(dir=args.directory) as directory:
    source, run, back = (Path(directory) / name for name in ('source', 'run', 'back'))
    total = write_model(source, size, SMALLEST if args.quick else Width())
    shards = len(list(source.glob('*.safetensors')))
    imported = in_a_process('import', source, run, args.dtype)
    on_disk = sum(path.stat().st_size for path in run.rglob('*') if path.is_file())
    exported = in_a_process('export', run, back, '')  # as imported, in bfloat16
  title = f'import of {total / 1e9:.2f} GB in {shards} shards, {os.cpu_count()} cores'
  table = Table('', 'seconds', title=title)
  for name, seconds in parts_of(imported).items():
    table.add_row(name, f'{seconds:.1f}')
  table.add_row('export, as the command', f'{exported.seconds:.1f}')
  Console().print(table)
  result = total * DTYPES[MODEL_DTYPES[args.dtype]].itemsize / DTYPES['BF16'].itemsize
  print(
    f'result {result / 1e9:.2f} GB in memory ({args.dtype}), {on_disk / 1e9:.2f} GB on the disk'
  )
  for name, found in {'import': imported.found, 'export': exported.found}.items():
    peak, before = found['peak'], found['before']
    print(
      f'{name}: peak of the process {peak / 1e9:.2f} GB, {before / 1e9:.2f} GB of it before '
      f'anything is read: {(peak - before) / result:.2f} times the result'
    )


def parts_of(imported: Measured) -> dict[str, float]:
  """Seconds of each part of an import, and of all."""
  whole, found = imported
  return {
    'read the files': found['read'],
    'convert, transpose, stack': found['load'] - found['read'],
    'digests': found['digest'],
    'save': found['save'] - found['digest'],
    'headers, config, tidying': found['all'] - found['load'] - found['save'],
    'start Python and JAX': whole - found['all'],
    'all, as the command': whole,
  }


if __name__ == '__main__':
  main()
