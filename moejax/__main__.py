"""Mixture-of-Experts pretraining in JAX.

  moejax train      trains a model, or goes on training it
  moejax plan       what a run would take on other chips, before anybody pays for them
  moejax generate   text from a run
  moejax hf         published checkpoints, imported and exported
  moejax certify    tries to break every promise about routing and balance

`moejax COMMAND --help` says more. `python -m moejax COMMAND` is the same.
"""

import difflib
import os
import sys
from collections.abc import Sequence

from moejax.runtime.command import run_quietly, usage_error

COMMANDS = ('train', 'plan', 'generate', 'hf', 'certify')


def main() -> int:
  """Runs the command that the process was started with; returns its exit status."""
  # As `python -m` does: a config file and its plugins may import what lies in the current folder.
  if os.getcwd() not in sys.path:
    sys.path.insert(0, os.getcwd())
  if sys.argv[1:2] == ['train']:
    from moejax.train.__main__ import start_again_with_huge_pages

    start_again_with_huge_pages()
  return run_quietly(run_moejax, sys.argv[1:])


def run_moejax(argv: Sequence[str]) -> int:
  """Runs the command that the first argument names; the others are its own."""
  name, *rest = argv or ['--help']
  if name in ('-h', '--help'):
    print(__doc__.strip())
    return 0
  # Imported one by one: each command sets the environment before it imports jax.
  match name:
    case 'train':
      return train_or_plan(rest)
    case 'plan':
      from moejax.plan.__main__ import main as command
    case 'generate':
      from moejax.generate import main as command
    case 'hf':
      from moejax.hf.__main__ import main as command
    case 'certify':
      from moejax.certify.__main__ import main as command
    case _:
      near = difflib.get_close_matches(name, COMMANDS, n=1)
      guess = f'did you mean {near[0]}? ' if near else ''
      problem = f'{name}: no such command; {guess}use one of {", ".join(COMMANDS)}'
      print(usage_error('moejax', problem), file=sys.stderr)
      return 2
  return command(rest)


def train_or_plan(argv: Sequence[str]) -> int:
  """Trains; or plans, with --plan or --topology."""
  if {'--plan', '--topology'} & {arg.partition('=')[0] for arg in argv}:
    from moejax.plan.__main__ import main as plan

    return plan(argv)
  from moejax.train.__main__ import main as train

  return train(argv, note_on_export)


def note_on_export(cfg: object) -> str:
  """Whether a published family can hold the model, told before anybody pays for its training."""
  from moejax.hf.spelling import export_outlook

  return export_outlook(cfg)


if __name__ == '__main__':
  sys.exit(main())
