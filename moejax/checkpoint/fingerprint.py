"""What a run must share with the checkpoint that it goes on from, and what it may change when it says so.

A fingerprint is name -> value as text: of the data, and of what the model computes, by names that begin with model.
"""

from collections.abc import Mapping

from moejax.config import check
from moejax.config.fields import walk_fields

# What checkpoint.accept may name -> the parts of a fingerprint that may then be others; what is in no row follows.
ACCEPT = {
  'batch': ('batch_size', 'seq_len'),
  'data': ('source', 'source_digest', 'mixture'),
  'model': (),
  'seed': ('seed',),
  'tokenizer': ('tokenizer', 'tokenizer_digest'),
}
ALWAYS = ('workdir', 'stop_after', 'data.cache_dir')  # change without a word
SHOWN = 8  # leaves in a message


def expect_same(
  path: str,
  kinds: tuple[Mapping[str, str], Mapping[str, str]],
  fingerprints: tuple[Mapping[str, str], Mapping[str, str]],
  accept: str,
) -> list[str]:
  """Compares leaves and fingerprints, (of the checkpoint at `path`, of this run); the differences that `accept` allows.

  Of the model's config only what both tell is compared: another version may know other fields, and leaves must agree.

  Raises:
    ConfigError: all other differences, and what would have to be accepted where that is possible.
  """
  problems, (old, new) = _differences(*kinds), fingerprints
  lines = {
    k: line if k.startswith('model.') else f'data {line}'
    for k, line in _differences(old, new).items()
    if not k.startswith('model.') or (k in old and k in new)
  }
  of = {
    k: {name for name, keys in ACCEPT.items() if k in keys or k.startswith(f'{name}.')}
    for k in lines
  }
  causes = {name for found in of.values() for name in found} - {'model'} or {'data'}
  of = {k: found or causes for k, found in of.items()}
  refused = [lines[k] for k in lines if not {*accepted_names(accept)} >= of[k]]
  remedy, all_of_it = (
    'give it or a new workdir',
    ','.join(sorted({*accepted_names(accept)}.union(*of.values()))),
  )
  remedy += '' if problems else f', or --config.checkpoint.accept={all_of_it} to go on all the same'
  leaves = [*problems.values()][:SHOWN] + [f'and {len(problems) - SHOWN} more leaves'] * (
    len(problems) > SHOWN
  )
  check(*(f'{path}: another config; {remedy}' for _ in [*refused, *leaves][:1]), *refused, *leaves)
  return [line for line in lines.values() if line not in refused]


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
  """key -> a line, for each key whose value is another, or is on one side only."""
  values = {k: [d[k] if k in d else 'absent' for d in (old, new)] for k in sorted({*old, *new})}
  return {
    k: f'{k}: {a} in the checkpoint, {b} in the config' for k, (a, b) in values.items() if a != b
  }


def accepted_names(accept: str) -> list[str]:
  """'data,seed' -> ['data', 'seed']."""
  return [name.strip() for name in accept.split(',') if name.strip()]


def accept_problem(accept: str) -> str:
  """What is wrong with it, '' when nothing is."""
  wrong = [name for name in accepted_names(accept) if name not in ACCEPT]
  return (
    f'accept={accept!r}: {wrong[0]!r} is not one of {sorted(ACCEPT)}; commas between'
    if wrong
    else ''
  )


def changes(old: object, new: object) -> list[str]:
  """A line for each field of a config that is another now than when the run was started last."""
  before = dict(walk_fields(old))
  return [
    f'{path} {before[path]!r} -> {value!r}'
    for path, value in walk_fields(new)
    if before[path] != value and path not in ALWAYS
  ]
