"""The last words of a run: report.json, and the lines that a person reads at the end."""

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

# What a report tells of the last step: a sound run uses 0.9 of its experts or more, has a balance score near 1, and a
# stability below 0.1.
MONITORS = (
  'eval/perplexity',
  'eval/expert_usage',
  'eval/balance_score',
  'eval/max_vio',
  'stability',
  'loss_spikes',
)


def at_step(rows: Sequence[Mapping[str, object]], step: int) -> dict[str, object]:
  """All that metrics.jsonl has of one step, by name."""
  return {name: value for row in rows if row['step'] == step for name, value in row.items()}


def monitors(last: Mapping[str, object]) -> dict[str, object]:
  """The MONITORS that the last step has."""
  return {name.removeprefix('eval/'): last[name] for name in MONITORS if name in last}


def best_row(rows: Sequence[Mapping[str, object]], bpb: float) -> float:
  """Bits per byte of the best validation; `bpb` where none was finite."""
  found = [row['eval/bits_per_byte'] for row in rows if 'eval/bits_per_byte' in row]
  return min(
    (value for value in found if value is not None), default=bpb
  )  # null: it was not finite


def not_finite(rows: Sequence[Mapping[str, object]]) -> list[int]:
  """The validations whose loss was none: no checkpoint of theirs is ever kept as the best."""
  return [
    row['step'] for row in rows if 'eval/bits_per_byte' in row and row['eval/bits_per_byte'] is None
  ]


def last_words(
  report: Mapping[str, object],
  watched: Mapping[str, float],
  compressed: Mapping[str, float],
  usage: str,
  text: str,
  workdir: pathlib.Path,
  prompt: str,
) -> list[str]:
  """The report for a person: what the model writes, how good it is, where it lies, how to go on."""
  python = min(sys.executable, os.path.relpath(sys.executable), key=len)
  return [
    'it writes:',
    '',
    *(f'  {line}' for line in text.split('\n')),
    '',
    f'done. {report["best_bits_per_byte"]:.4f} bits per byte at best, {report["bits_per_byte"]:.4f} at the end'
    + ''.join(f'; {name} {value:.3f}' for name, value in compressed.items()),
    *(
      f'bad      validation after step {step} was not finite: never the best'
      for step in report['not_finite']
    ),
    f'experts  {usage}, on held-out text',
    'monitors '
    + ', '.join(f'{name} {value:.4g}' for name, value in watched.items() if value is not None),
    f'state    digest {report["digest"][:16]}',
    f'run      {workdir}: metrics.jsonl, tensorboard (tensorboard --logdir={workdir}), checkpoints',
    f'sample   {python} -m moejax.generate --workdir={workdir} --prompt="{prompt}"',
  ]
