"""How a model is published: its family, its config.json, the names and dtypes of its tensors.

a run's config, and the Origin that an import kept -> plan_export(...) -> ExportPlan

All of it is decided before a byte is written.
"""

import dataclasses
from collections import Counter
from typing import NamedTuple

from moejax.config import ConfigError, check, not_one_of, problem_if
from moejax.data.special_tokens import GENERATION_FILE, SpecialTokens
from moejax.families import FAMILIES, config_json, family_of
from moejax.families.schema.family import Family, config_from_json
from moejax.families.schema.tensor_names import TIED_HEAD
from moejax.hf.safetensors.file import MODEL_DTYPES
from moejax.hf.spelling import Json, Spelling, kept_keys, only_able, spell_in, unsaid_keys
from moejax.hf.weights import MadeOf, Published, repeated
from moejax.model.config import ModelConfig
from moejax.runtime.files import read_json
from moejax.train.experiment.config import ExperimentConfig

TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


class Origin(NamedTuple):
  """What an import keeps of the files that a model came from, to be given back by an export."""

  config: Json  # config.json as it was
  generation_config: Json
  dtype: str  # of most tensors; a row of safetensors.file.DTYPES
  other_dtypes: dict[str, str]  # name -> that of the others
  copies: list[str]  # names of tensors that repeat another one
  dequantised: bool  # the files had blocks with scales


class ExportPlan(NamedTuple):
  """How a model will lie in files."""

  known: Family
  config: Json  # config.json
  generation_config: Json
  made_of: MadeOf  # path of each leaf -> the tensors that it is made of
  copies: dict[str, str]  # from weights.repeated
  dtypes: dict[str, str]  # name -> row of safetensors.file.DTYPES


def origin_of(source: Published) -> Origin:
  """Returns what is to be kept of published files.

  What lies in blocks with scales cannot be written again to the byte: it becomes bfloat16, as it
  is served.
  """
  stored = source.tensors
  names = {part.name for parts in source.made_of.values() for part in parts} | {*source.copies}
  dtypes: dict[str, str] = {}
  for name in sorted(names):
    dtypes[name] = 'BF16' if stored.is_quantised(name) else stored.dtype(name)
  [(usual, _)] = Counter(dtypes.values()).most_common(1)
  return Origin(
    config=source.config,
    generation_config=read_json(source.directory, GENERATION_FILE),
    dtype=usual,
    other_dtypes={name: dtype for name, dtype in dtypes.items() if dtype != usual},
    copies=sorted(source.copies),
    dequantised=any(map(stored.is_quantised, stored.names)),
  )


def plan_export(
  cfg: ExperimentConfig, origin: Origin | None, said: Json, wanted: str, dtype: str
) -> ExportPlan:
  """Returns how the model of a run is published.

  Args:
    cfg: of the run, its vocabulary resolved.
    origin: of a model that was imported, or trained on from an import.
    said: from `special_keys`, for a config.json that is not the origin's.
    wanted: model_type of the family; '': the origin's, or the only one whose files can hold the
      model.
    dtype: a row of MODEL_DTYPES for all but the router bias, which small steps move; '': the
      origin's for what was imported, and float32 for what was trained, since anything else would
      round it.

  Raises:
    ConfigError: no such family or dtype, or files of the family cannot hold the model; or several
      families' can.
  """
  check(
    problem_if(
      wanted and wanted not in FAMILIES, f'--family={wanted!r} is not one of {sorted(FAMILIES)}'
    ),
    not_one_of('--dtype', dtype, MODEL_DTYPES) if dtype else '',
  )
  origin = _usable(origin, cfg, wanted)
  spelling = _spell(cfg, origin, said, wanted)
  config, made_of = spelling.config, spelling.made_of
  repeats = repeated(cfg.model, made_of)
  # A head that repeats the embedding is written where it was found, and otherwise left out, as
  # transformers does.
  found = origin.copies if origin else [copy for copy in repeats if copy != TIED_HEAD]
  copies = {copy: name for copy, name in repeats.items() if copy in found}
  generation = origin.generation_config if origin else {}
  stored = None if cfg.steps else origin  # the tensors are still those of the origin's files
  if not stored or dtype or stored.dequantised:
    # transformers 5 reads both spellings, 4 the older one.
    key = 'dtype' if 'dtype' in config else 'torch_dtype'
    config[key] = dtype or ('bfloat16' if stored else 'float32')
  if cfg.steps and 'max_position_embeddings' in config:  # it may have read longer rows since
    config['max_position_embeddings'] = max(config['max_position_embeddings'], cfg.seq_len)
  return ExportPlan(
    known=spelling.known,
    config=config,
    generation_config=generation or {key: config[key] for key in TOKEN_IDS if key in config},
    made_of=made_of,
    copies=copies,
    dtypes=_tensor_dtypes(made_of, copies, stored, dtype),
  )


def special_keys(special: SpecialTokens, eod_id: int) -> Json:
  """Returns what config.json says of special tokens and of the context length.

  Args:
    special: of the model.
    eod_id: of the run's tokenizer, which opens a text as well if the run is our own; -1: not known.
  """
  if not special.is_published:
    return {'bos_token_id': eod_id, 'eos_token_id': eod_id} if eod_id >= 0 else {}
  keys: Json = {}
  if special.bos_id >= 0:
    keys['bos_token_id'] = special.bos_id
  if special.eos_ids:
    first, *others = special.eos_ids
    keys['eos_token_id'] = [first, *others] if others else first
  if special.pad_id >= 0:
    keys['pad_token_id'] = special.pad_id
  if special.context_length:
    keys['max_position_embeddings'] = special.context_length
  return keys


def _usable(origin: Origin | None, cfg: ExperimentConfig, wanted: str) -> Origin | None:
  """The origin, if the model is still of its family: in another one its keys mean other things."""
  if origin is None:
    return None
  known = family_of(origin.config)
  if wanted and FAMILIES[wanted] is not known:
    return None
  # What was trained on may have become another model, as by upcycling.
  if cfg.steps and not wanted:
    try:
      spell_in(known, cfg.model, kept_keys(known, origin.config))
    except ConfigError:
      return None
  return origin


def _tensor_dtypes(
  made_of: MadeOf, copies: dict[str, str], origin: Origin | None, dtype: str
) -> dict[str, str]:
  """Name -> row of safetensors.file.DTYPES; arguments as in `plan_export`."""
  paths = {part.name: path for path, parts in made_of.items() for part in parts}
  dtypes: dict[str, str] = {}
  for name, path in (paths | copies).items():
    if origin and not dtype:
      others = origin.other_dtypes
      dtypes[name] = others[name] if name in others else origin.dtype
    elif path == 'router.bias':
      # The small steps of the bias rules would be lost in bfloat16.
      dtypes[name] = 'F32'
    else:
      dtypes[name] = MODEL_DTYPES[dtype or 'float32']
  return dtypes


def _spell(cfg: ExperimentConfig, origin: Origin | None, said: Json, wanted: str) -> Spelling:
  """The model in the words of its origin, of the family wanted, or of the only one that can."""
  if not origin:
    candidates = [FAMILIES[wanted]] if wanted else [*FAMILIES.values()]
    return only_able(candidates, cfg.model, unsaid_keys(cfg, said))
  known = family_of(origin.config)
  spelling = spell_in(known, cfg.model, kept_keys(known, origin.config))
  # To the byte what was imported, if that is what the model still is.
  unchanged = _unchanged_config(known, cfg.model, origin, spelling.config)
  return spelling._replace(config=unchanged or spelling.config)


def _unchanged_config(known: Family, cfg: ModelConfig, origin: Origin, written: Json) -> Json:
  """The origin's config.json, if that is what the model still is; {} if not."""
  # Files may lack the layers of multi-token prediction that their config.json speaks of; then the
  # import has none.
  before = dataclasses.replace(config_from_json(known, origin.config), mtp_depth=cfg.mtp_depth)
  if config_json(known, before, kept_keys(known, origin.config)) != written:
    return {}
  return {name: value for name, value in origin.config.items() if name != 'quantization_config'}
