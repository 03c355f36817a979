"""What a run must share with the checkpoint that it goes on from, and what it may change.

A fingerprint is field -> value as text: of the data, and of what the model computes, by fields that
begin with model.
"""

from collections.abc import Mapping
from typing import NamedTuple

from moejax.config import check
from moejax.config.fields import walk_fields

# Names in checkpoint.accept -> the fields of a fingerprint that may then differ. A field that is in
# no row follows from the others, as the first batch does from the seed.
ACCEPT = {
  'batch': ('batch_size', 'seq_len'),
  'data': ('source', 'source_digest', 'mixture', 'held_out'),
  'model': (),  # the fields that begin with model.
  'seed': ('seed',),
  'tokenizer': ('tokenizer', 'tokenizer_digest'),
}
ALWAYS = ('workdir', 'stop_after', 'data.cache_dir')  # fields of a config that change silently
LEAVES_SHOWN = 8  # leaves in a message


class Compared(NamedTuple):
  """Two tables of name -> value."""

  saved: Mapping[str, str]  # of the checkpoint
  current: Mapping[str, str]  # of this run


def expect_same(path: str, kinds: Compared, fingerprints: Compared, accept: str) -> list[str]:
  """Compares leaves and fingerprints of a checkpoint and of this run.

  Of the model's config only the fields that both have are compared: another version may know other
  ones, and the leaves have to agree in any case.

  Args:
    path: of the checkpoint, for the message.
    kinds: path of a leaf -> dtype and shape.
    fingerprints: field -> value.
    accept: names of rows of ACCEPT, with commas between.

  Returns:
    The differences that `accept` allows, in lines.

  Raises:
    ConfigError: all other differences, and what would have to be accepted where that is possible.
  """
  leaf_problems = list(_differences(*kinds).values())
  differences = _fingerprint_differences(*fingerprints)
  names_needed = _names_needed(list(differences))
  accepted = set(accepted_names(accept))
  refused = [
    line for field, line in differences.items() if not names_needed[field].issubset(accepted)
  ]

  leaves = leaf_problems[:LEAVES_SHOWN]
  if len(leaf_problems) > LEAVES_SHOWN:
    leaves.append(f'and {len(leaf_problems) - LEAVES_SHOWN} more leaves')
  remedy = 'give it or a new workdir'
  if not leaf_problems:  # nothing makes up for other arrays
    names = ','.join(sorted(accepted.union(*names_needed.values())))
    remedy += f', or --config.checkpoint.accept={names} to go on all the same'
  headline = [f'{path}: another config; {remedy}'] if refused or leaves else []
  check(*headline, *refused, *leaves)
  return [line for line in differences.values() if line not in refused]


def _fingerprint_differences(
  saved: Mapping[str, str], current: Mapping[str, str]
) -> dict[str, str]:
  """Returns field -> a line, for each field of the fingerprints that counts as another."""
  lines = {}
  for field, line in _differences(saved, current).items():
    if not field.startswith('model.'):
      lines[field] = f'data {line}'
    elif field in saved and field in current:
      lines[field] = line
  return lines


def _differences(saved: Mapping[str, str], current: Mapping[str, str]) -> dict[str, str]:
  """Returns name -> a line, for each name whose value is another, or is on one side only."""
  lines = {}
  for name in sorted({*saved, *current}):
    before = saved[name] if name in saved else 'absent'
    now = current[name] if name in current else 'absent'
    if before != now:
      lines[name] = f'{name}: {before} in the checkpoint, {now} in the config'
  return lines


def _names_needed(fields: list[str]) -> dict[str, set[str]]:
  """Returns field -> all names that have to be accepted for it to differ."""
  names_needed = {field: accept_names_for(field) for field in fields}
  # The fields of no row are of the data, and come from all that differs there.
  causes = set().union(*names_needed.values()) - {'model'} or {'data'}
  return {field: names or causes for field, names in names_needed.items()}


def accept_names_for(field: str) -> set[str]:
  """Returns the names of the rows of ACCEPT that a field is in.

  The field model.top_k is in the row of model. A field that follows from others is in none.
  """
  return {
    name for name, fields in ACCEPT.items() if field in fields or field.startswith(f'{name}.')
  }


def accepted_names(accept: str) -> list[str]:
  """Returns the names in a text with commas: 'data,seed' -> ['data', 'seed']."""
  return [name.strip() for name in accept.split(',') if name.strip()]


def accept_problem(accept: str) -> str:
  """Returns what is wrong with the field `accept` of a config, '' if nothing is."""
  unknown_names = [name for name in accepted_names(accept) if name not in ACCEPT]
  if not unknown_names:
    return ''
  return f'accept={accept!r}: {unknown_names[0]!r} is not one of {sorted(ACCEPT)}; commas between'


def changes(old: object, new: object) -> list[str]:
  """Returns a line for each field of a config that is another now than at the run's last start."""
  before = dict(walk_fields(old))
  return [
    f'{path} {before[path]!r} -> {value!r}'
    for path, value in walk_fields(new)
    if before[path] != value and path not in ALWAYS
  ]
