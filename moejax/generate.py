"""Text from a trained model: the command.

python -m moejax.generate --workdir=DIR --prompt="def " [--max_tokens=64 --temperature=0.8 --top_p=0.95 --draft]
python -m moejax.generate --workdir=DIR --prompt_ids=1,2,3            a run without a tokenizer; prints ids
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.config import ConfigError, check
from moejax.inference.sampling import SampleConfig, Timed, decode, encode_prompt, guesses, text
from moejax.model.config import ModelConfig
from moejax.train.experiment.run_dir import TOKENIZER_FILE, open_run


def main(argv: Sequence[str]) -> int:
  """Parses, loads, prints. Returns the exit status: 0, 2 for bad arguments, 3 without a loadable checkpoint."""
  args = vars(parser().parse_args(argv))
  workdir, prompt, ids = (args.pop(name) for name in ('workdir', 'prompt', 'prompt_ids'))
  try:
    cfg = SampleConfig(**args | {'stop': tuple(args['stop'])})
    _, tokenizer, step, model, router = open_run(workdir)
    guesses(model.cfg, cfg)
    check(
      ''
      if tokenizer or ids
      else f'{workdir} holds no {TOKENIZER_FILE}: give --prompt_ids instead of --prompt'
    )
    if ids:
      prompts, ends = (
        [parse_token_ids(ids, '--prompt_ids', model.cfg)],
        parse_token_ids(','.join(cfg.stop), '--stop', model.cfg),
      )
    else:
      prompts, ends = encode_prompt(tokenizer, prompt, cfg.stop)
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
  made = argparse.ArgumentParser(
    prog='python -m moejax.generate', description='Samples text from a run.'
  )
  made.add_argument('--workdir', required=True, help='directory of the run')
  what = made.add_mutually_exclusive_group()
  what.add_argument('--prompt', default='', help='text to continue')
  what.add_argument(
    '--prompt_ids', default='', metavar='1,2,3', help='token ids to continue; ids are printed'
  )
  for field in dataclasses.fields(SampleConfig):
    if field.name == 'stop':
      made.add_argument(
        '--stop', action='append', default=[], help='where to end, before it; may be given again'
      )
    elif field.name == 'draft':
      made.add_argument(
        '--draft',
        action='store_true',
        help='guess by multi-token prediction: same text, fewer steps',
      )
    else:
      made.add_argument(f'--{field.name}', type=type(field.default), default=field.default)
  return made


def parse_token_ids(text: str, flag: str, cfg: ModelConfig) -> list[int]:
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
