"""The final report of a run: report.json, and the lines that a person reads at the end."""

import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence

from moejax.runtime.terminal import shown_as_text

# What a report tells of the last step: a sound run uses 0.9 of its experts or more, has a balance
# score near 1, and a stability below 0.1.
MONITORS = (
  'eval/perplexity',
  'eval/expert_usage',
  'eval/balance_score',
  'eval/max_vio',
  'stability',
  'loss_spikes',
)


def row_of_step(rows: Sequence[Mapping[str, object]], step: int) -> dict[str, object]:
  """All that metrics.jsonl has of one step, by name: training and validation are rows of it."""
  return {name: value for row in rows if row['step'] == step for name, value in row.items()}


def monitors(last: Mapping[str, object]) -> dict[str, object]:
  """The MONITORS that the row of the last step has, without the eval/ of their names."""
  return {name.removeprefix('eval/'): last[name] for name in MONITORS if name in last}


def best_bits_per_byte(rows: Sequence[Mapping[str, object]], bpb: float) -> float:
  """Bits per byte of the best validation in metrics.jsonl; `bpb` where none was finite."""
  validations = [row['eval/bits_per_byte'] for row in rows if 'eval/bits_per_byte' in row]
  # JSON has null for what was not finite.
  return min((value for value in validations if value is not None), default=bpb)


def non_finite_validations(rows: Sequence[Mapping[str, object]]) -> list[int]:
  """The steps whose validation was not finite: no checkpoint of theirs is ever kept as the best."""
  return [
    row['step'] for row in rows if 'eval/bits_per_byte' in row and row['eval/bits_per_byte'] is None
  ]


def report_lines(
  report: Mapping[str, object],
  watched: Mapping[str, float],
  compressed: Mapping[str, float],
  *,
  compared: Sequence[str],
  usage: str,
  text: str,
  workdir: pathlib.Path,
  prompt: str,
) -> list[str]:
  """The report for a person: what the model writes, how good it is, where it lies, how to go on.

  Args:
    report: what report.json holds.
    watched: the `monitors` of the last step.
    compressed: compressor -> bits per byte of the held-out text.
    compared: lines that set held-out text beside training text, see held_out_report.py.
    usage: how experts were used in the last validation, in words.
    text: the sample of the last validation, which begins with the prompt; '' where none was drawn.
  """
  # The interpreter as it would be typed: relative where that is shorter.
  python = min(sys.executable, os.path.relpath(sys.executable), key=len)
  sample = ['it writes:', '', *(f'  {line}' for line in shown_as_text(text).split('\n')), '']
  # In double quotes, which read better, where nothing in it has a meaning there.
  is_plain = not set(prompt) & {*'"$`\\!'}
  quoted_prompt = f'"{prompt}"' if is_plain else shlex.quote(prompt)
  best, last = report['best_bits_per_byte'], report['bits_per_byte']
  others = ''.join(f'; {name} {value:.3f}' for name, value in compressed.items())
  non_finite = [
    f'bad      validation after step {step} was not finite: never the best'
    for step in report['not_finite']
  ]
  values = [f'{name} {value:.4g}' for name, value in watched.items() if value is not None]
  quoted = shlex.quote(str(workdir))
  board = f'tensorboard (tensorboard --logdir={quoted})'
  return [
    *(sample if text else []),
    f'done. {last:.4f} bits per byte of held-out text{others}; {best:.4f} at best, of a validation',
    *compared,
    *non_finite,
    f'experts  {usage}, on held-out text',
    f'monitors {", ".join(values)}',
    f'state    digest {report["digest"][:16]}',
    f'run      {workdir}: metrics.jsonl, {board}, checkpoints',
    f'sample   {python} -m moejax.generate --workdir={quoted} --prompt={quoted_prompt}',
  ]
