"""Text from a trained model: the command.

python -m moejax.generate --workdir=DIR --prompt="def " [--max_tokens=64 --top_p=0.95 --draft]
python -m moejax.generate --workdir=DIR --prompt_ids=1,2,3     a run without a tokenizer; prints ids
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence

from moejax.checkpoint.checkpoints import NoLoadableCheckpoint
from moejax.config import ConfigError, check, local_path, problem_if, utf8_problem
from moejax.config.help_text import field_meanings
from moejax.inference.sampling import (
  NonFiniteLogits,
  SampleConfig,
  TimedSteps,
  decode,
  decoding_note,
  detokenize,
  drafts_per_step,
  encode_prompt,
)
from moejax.model.config import ModelConfig
from moejax.runtime.command import CommandParser, run_quietly, usage_error
from moejax.train.experiment.run_dir import TOKENIZER_FILE, open_run, text_ends


def main(argv: Sequence[str]) -> int:
  """Parses the flags, loads a run and prints its text.

  Returns:
    The exit status: 0, 2 for bad arguments, 3 without a loadable checkpoint, 4 where the model's
    logits are not finite.
  """
  args = vars(flag_parser().parse_args(argv))
  workdir, prompt, ids = (args.pop(name) for name in ('workdir', 'prompt', 'prompt_ids'))
  try:
    texts = [('--prompt', prompt), *(('--stop', stop) for stop in args['stop'])]
    check(*(utf8_problem(flag, text) for flag, text in texts))
    workdir = str(local_path('--workdir', workdir))
    cfg = SampleConfig(**args | {'stop': tuple(args['stop'])})
    _, tokenizer, step, model, router = open_run(workdir)
    drafts_per_step(model.cfg, cfg)  # raises before anything is printed
    ends = text_ends(workdir, tokenizer)
    # Without a tokenizer there is no text, only ids.
    check(
      problem_if(
        not (tokenizer or ids),
        f'{workdir} holds no {TOKENIZER_FILE}: give --prompt_ids instead of --prompt',
      )
    )
    if ids:
      prompts = [parse_token_ids(ids, '--prompt_ids', model.cfg)]
      ends = [*ends, *parse_token_ids(','.join(cfg.stop), '--stop', model.cfg)]
    else:
      prompts, ends = encode_prompt(tokenizer, prompt, cfg.stop)
  # Errors of what was asked for are one message; any other is a bug, and keeps its traceback.
  except (ConfigError, NoLoadableCheckpoint) as error:
    print(usage_error('moejax.generate', error), file=sys.stderr)
    return 2 if isinstance(error, ConfigError) else 3
  # All but the text goes to stderr, so that stdout is the text alone.
  print(f'step {step} of {workdir}', file=sys.stderr)
  note = decoding_note(model.cfg)
  if note:
    print(note, file=sys.stderr)
  steps = TimedSteps(decode(model, router, prompts, cfg, ends))
  pieces = format_ids(steps, ends) if ids else detokenize(steps, tokenizer, prompts[0], cfg.stop)
  print(ids or prompt, end='', flush=True)
  try:
    for piece in pieces:
      print(piece, end='', flush=True)
  except NonFiniteLogits as error:
    print()
    print(usage_error('moejax.generate', error), file=sys.stderr)
    return 4
  print()
  print(steps.report(cfg.draft), file=sys.stderr)
  return 0


def flag_parser() -> argparse.ArgumentParser:
  """Makes the parser of the command's flags: those of SampleConfig, and what to go on with."""
  parser = CommandParser(prog='python -m moejax.generate', description='Samples text from a run.')
  meanings = field_meanings(SampleConfig)
  parser.add_argument('--workdir', required=True, help='directory of the run')
  prompt = parser.add_mutually_exclusive_group()
  prompt.add_argument('--prompt', default='', help='text to continue')
  prompt.add_argument(
    '--prompt_ids', default='', metavar='1,2,3', help='token ids to continue; ids are printed'
  )
  # Two fields have other flags than `--field=value`: one that is repeated, and one that is given.
  for field in dataclasses.fields(SampleConfig):
    if field.name == 'stop':
      parser.add_argument(
        '--stop', action='append', default=[], help='where to end, before it; may be given again'
      )
    elif field.name == 'draft':
      parser.add_argument(
        '--draft',
        action='store_true',
        help='guess by multi-token prediction: same text, fewer steps',
      )
    else:
      parser.add_argument(
        f'--{field.name}',
        type=type(field.default),
        default=field.default,
        help=f'{meanings[field.name]} (default {field.default})'.replace('%', '%%'),
      )
  return parser


def format_ids(steps: Iterable[list[list[int]]], ends: Sequence[int]) -> Iterator[str]:
  """Yields the ids of one row, each after a comma, without the end."""
  for (new_ids,) in steps:
    for token in new_ids:
      if token not in ends:
        yield f',{token}'


def parse_token_ids(text: str, flag: str, cfg: ModelConfig) -> list[int]:
  """Reads token ids from a list with commas; `flag` names it in errors.

  Raises:
    ConfigError: not numbers, or not of this model's vocabulary.
  """
  parts = text.split(',') if text else []
  wrong = [part for part in parts if not (part.strip().isdecimal() and int(part) < cfg.vocab_size)]
  last = cfg.vocab_size - 1
  check(*(f'{flag}: {part!r} is not a token id, 0 to {last}' for part in wrong))
  return [int(part) for part in parts]


if __name__ == '__main__':
  sys.exit(run_quietly(main, sys.argv[1:]))
