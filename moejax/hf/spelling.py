"""A model in the words of one family: its config.json and the names of its tensors, or why not."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

from moejax.config import ConfigError, check, problem_if
from moejax.config.decimals import decimal_of
from moejax.families import FAMILIES, config_json
from moejax.families.schema.family import KEPT, Family
from moejax.families.schema.tensor_names import leaves, must_be_zero, tensors
from moejax.hf.weights import MadeOf
from moejax.model.config import ModelConfig
from moejax.train.experiment.config import ExperimentConfig

Json = dict[str, object]


class Spelling(NamedTuple):
  """A model in the words of one family."""

  known: Family
  config: Json  # config.json
  made_of: MadeOf


def unsaid_keys(cfg: ExperimentConfig, said: Json) -> Json:
  """Keys that no field of the model says, in a family that it was not imported from."""
  yarn = cfg.model.attention.rope.yarn
  longest = (
    round(yarn.original_length * decimal_of(yarn.factor)) if yarn.factor > 1 else cfg.seq_len
  )
  return {'max_position_embeddings': longest} | said


def kept_keys(known: Family, config: Json) -> Json:
  """Keys that no field of the model says, and those that say what files hold."""
  names = KEPT | {row.key for row in known.names.values()}
  return {name: config[name] for name in names if name in config}


def spell_in(known: Family, cfg: ModelConfig, kept: Json) -> Spelling:
  """Raises ConfigError where the family's files cannot hold the model."""
  config = config_json(known, cfg, kept)
  return Spelling(known, config, tensors(known.names, cfg, config, _leaves(cfg)))


@functools.lru_cache(maxsize=1)
def _leaves(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The leaves of a model, whose shapes take longer to find than all else: not once a family."""
  return leaves(cfg)


def only_able(candidates: list[Family], cfg: ModelConfig, kept: Json) -> Spelling:
  """Returns the model in the words of the only candidate whose files can hold it.

  Raises:
    ConfigError: none can, with the reasons of each; or several can.
  """
  able, problems = spellings(candidates, cfg, kept)
  if not able:
    several = 'no family here has files that can hold this model:'
    one = 'files of this family cannot hold this model:'
    lines = [f'  {kind}: {problem}' for kind, found in problems.items() for problem in found]
    raise ConfigError(several if len(candidates) > 1 else one, *lines)
  names = ' or '.join(sorted(able))
  check(
    problem_if(len(able) > 1, f'this model can be published as {names}: choose one with --family=')
  )
  [spelling] = able.values()
  return spelling


def spellings(
  candidates: Iterable[Family], cfg: ModelConfig, kept: Json
) -> tuple[dict[str, Spelling], dict[str, list[str]]]:
  """Returns model_type -> the model in its words, and model_type -> why it has none."""
  able: dict[str, Spelling] = {}
  problems: dict[str, list[str]] = {}
  for known in candidates:
    try:
      able[known.model_type] = spell_in(known, cfg, kept)
    except ConfigError as error:
      problems[known.model_type] = [*error.problems]
  return able, problems


def export_outlook(cfg: ExperimentConfig) -> str:
  """Returns a line that says, before a run is paid for, whether its export will find a family.

  Where none is found, it names the family whose files lack the least, and what that is.
  """
  # The size of the vocabulary, which the text may decide, is said by every family.
  model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or 1)
  able, problems = spellings(FAMILIES.values(), model, unsaid_keys(cfg, {}))
  biasless = [
    kind
    for kind, spelling in able.items()
    if 'router.bias' in must_be_zero(spelling.known.names, spelling.config)
  ]
  kinds = sorted({*able} - {*(biasless if cfg.balance.bias_rule else [])})
  if kinds:
    return f'export  as {" or ".join(kinds)}, by python -m moejax.hf export'
  if biasless:
    return (
      f'export  not as it is: {" or ".join(sorted(biasless))} could hold this model, but for the '
      f"bias that balance.bias_rule={cfg.balance.bias_rule!r} moves; with '' it can be exported"
    )
  nearest = min(problems, key=lambda kind: len(problems[kind]))
  reasons = '; '.join(problems[nearest])
  return f'export  no published family can hold this model; the nearest is {nearest}: {reasons}'
