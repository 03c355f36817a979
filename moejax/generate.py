"""Text from a trained model: the command, and reading the model of a run.

  python -m moejax.generate --workdir=DIR --prompt="def " [--max_tokens=64 --temperature=0.8 --top_p=0.95 --draft]
  python -m moejax.generate --workdir=DIR --prompt_ids=1,2,3            a run without a tokenizer; prints ids
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import sys

import jax
from jax import Array

from moejax.checkpoint import Checkpoints, NoLoadableCheckpoint
from moejax.config import ConfigError, check
from moejax.experiment import CHECKPOINTS, TOKENIZER_FILE, ExperimentConfig, read_config, resolved
from moejax.moe.bias import BiasState
from moejax.sampling import SampleConfig, Timed, decode, guesses, opened, text
from moejax.state import TrainState, init_state
from moejax.tensors import inside
from moejax.tokenizer import Tokenizer, load_tokenizer
from moejax.transformer import ModelConfig, Transformer


def load(workdir: str) -> tuple[ExperimentConfig, Tokenizer | None, int, Transformer, Array]:
  """The newest verified step of a run. -> config, tokenizer if there is one, step, model, router bias."""
  cfg, tokenizer = run_in(workdir)
  step, model, router = read_model(workdir, jax.eval_shape(lambda: init_state(cfg)), cfg)
  return cfg, tokenizer, step, model, router.bias


def run_in(workdir: str) -> tuple[ExperimentConfig, Tokenizer | None]:
  """The config of a run, with the size of the vocabulary, and the tokenizer if there is one."""
  cfg, path = read_config(workdir), inside(pathlib.Path(workdir), TOKENIZER_FILE)
  tokenizer = load_tokenizer(str(path)) if path.exists() else None
  cfg = resolved(cfg, tokenizer.vocab_size if tokenizer else 0)
  check('' if cfg.model.vocab_size else f'{path} is missing, and the config has model.vocab_size=0: put it back')
  return cfg, tokenizer


def read_model(workdir: str, target: TrainState, cfg: ExperimentConfig) -> tuple[int, Transformer, BiasState]:
  """Step, model and router of the newest verified checkpoint of a run, on the shardings of `target`.

  Raises:
    ConfigError: that run's model has other shapes than `target`.
    NoLoadableCheckpoint: there is none, or none that verifies.
  """
  checkpoints = Checkpoints(pathlib.Path(workdir) / CHECKPOINTS, cfg.checkpoint, readonly=True)
  found = checkpoints.restore({'model': target.model, 'router': target.router}, {}, only=('model', 'router'))
  if found is None:
    raise NoLoadableCheckpoint(f'workdir={workdir!r} has no checkpoint yet: train it first')
  return found[0], found[1]['model'], found[1]['router']


def main(argv: Sequence[str]) -> int:
  """Parses, loads, prints. Returns the exit status: 0, 2 for bad arguments, 3 without a loadable checkpoint."""
  args = vars(parser().parse_args(argv))
  workdir, prompt, ids = (args.pop(name) for name in ('workdir', 'prompt', 'prompt_ids'))
  try:
    cfg = SampleConfig(**args | {'stop': tuple(args['stop'])})
    _, tokenizer, step, model, router = load(workdir)
    guesses(model.cfg, cfg)
    check('' if tokenizer or ids else f'{workdir} holds no {TOKENIZER_FILE}: give --prompt_ids instead of --prompt')
    if ids:
      prompts, ends = [numbers(ids, '--prompt_ids', model.cfg)], numbers(','.join(cfg.stop), '--stop', model.cfg)
    else:
      prompts, ends = opened(tokenizer, prompt, cfg.stop)
  except (ConfigError, NoLoadableCheckpoint) as error:
    print(f'moejax.generate: {error}', file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 3
  print(f'step {step} of {workdir}', file=sys.stderr)
  steps = Timed(decode(model, router, prompts, cfg, ends))
  spelt = (f',{token}' for (new,) in steps for token in new if token not in ends)
  print(ids or prompt, end='', flush=True)
  for piece in spelt if ids else text(steps, tokenizer, cfg.stop):
    print(piece, end='', flush=True)
  print()
  print(steps.report(cfg.draft), file=sys.stderr)
  return 0


def parser() -> argparse.ArgumentParser:
  """Of the command's flags: those of SampleConfig, and what to go on with."""
  made = argparse.ArgumentParser(prog='python -m moejax.generate', description='Samples text from a run.')
  made.add_argument('--workdir', required=True, help='directory of the run')
  what = made.add_mutually_exclusive_group()
  what.add_argument('--prompt', default='', help='text to continue')
  what.add_argument('--prompt_ids', default='', metavar='1,2,3', help='token ids to continue; ids are printed')
  for field in dataclasses.fields(SampleConfig):
    if field.name == 'stop':
      made.add_argument('--stop', action='append', default=[], help='where to end, before it; may be given again')
    elif field.name == 'draft':
      made.add_argument('--draft', action='store_true', help='guess by multi-token prediction: same text, fewer steps')
    else:
      made.add_argument(f'--{field.name}', type=type(field.default), default=field.default)
  return made


def numbers(text: str, flag: str, cfg: ModelConfig) -> list[int]:
  """Token ids from a list with commas.

  Raises:
    ConfigError: not numbers, or not of this model's vocabulary.
  """
  parts = text.split(',') if text else []
  wrong = [part for part in parts if not (part.strip().isdecimal() and int(part) < cfg.vocab_size)]
  check(*(f'{flag}: {part!r} is not a token id, 0 to {cfg.vocab_size - 1}' for part in wrong))
  return [int(part) for part in parts]


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
