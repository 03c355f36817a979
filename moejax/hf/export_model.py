"""What a model is called when it is published: its family, config.json, and the names and dtypes of its tensors.

a run's config, and the Origin that an import kept -> plan(...) -> Plan, all that is decided before a byte is written
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moejax.config import ConfigError, check
from moejax.families import FAMILIES, config_json, family_of
from moejax.families.schema.family import KEPT, Family, read_config
from moejax.families.schema.tensor_names import leaves, tensors
from moejax.hf.progress import progress_bar, say
from moejax.hf.safetensors.directory import write_tensors
from moejax.hf.safetensors.file import Spec
from moejax.hf.weights import MadeOf, Published, lost, repeated, tensor_specs
from moejax.model.config import ModelConfig
from moejax.runtime.files import expect_room, read_json
from moejax.sharding.tree import flatten
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.run_dir import CONFIG_FILE, TOKENIZER_FILE, read_model_on, read_setup

GENERATION_FILE = 'generation_config.json'
EXPORT_DTYPES = {'float32': 'F32', 'bfloat16': 'BF16'}
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
Json = dict[str, object]


class Origin(NamedTuple):
  """What an import keeps of the files that a model came from, to be given back by an export."""

  config: Json  # config.json as it was
  generation_config: Json
  dtype: str  # of most tensors; a row of tensors.DTYPES
  other_dtypes: dict[str, str]  # name -> that of the others
  copies: list[str]  # names of tensors that repeat another one
  dequantised: bool  # the files had blocks with scales


def origin_of(source: Published) -> Origin:
  """What lies in blocks with scales cannot be written again to the byte: it becomes bfloat16, as it is served."""
  stored = source.tensors
  names = {part.name for parts in source.made_of.values() for part in parts} | {*source.copies}
  dtypes = {
    name: 'BF16' if stored.is_quantised(name) else stored.dtype(name) for name in sorted(names)
  }
  [(usual, _)] = Counter(dtypes.values()).most_common(1)
  return Origin(
    source.config,
    read_json(source.directory, GENERATION_FILE),
    usual,
    {name: dtype for name, dtype in dtypes.items() if dtype != usual},
    sorted(source.copies),
    any(map(stored.is_quantised, stored.names)),
  )


class ExportPlan(NamedTuple):
  """How a model will lie in files."""

  known: Family
  config: Json
  generation_config: Json
  made_of: MadeOf
  copies: dict[str, str]  # see transfer.repeated
  dtypes: dict[str, str]  # name -> row of tensors.DTYPES


def plan_export(
  cfg: ExperimentConfig, origin: Origin | None, eod_id: int, wanted: str, dtype: str
) -> ExportPlan:
  """How the model of a run is published.

  Args:
    cfg: of the run, its vocabulary resolved.
    origin: of an imported model.
    eod_id: the token between the run's documents, which begins a text as well; -1: not known.
    wanted: model_type of the family; '': the origin's, or the only one whose files can hold the model.
    dtype: a row of DTYPES for all but the router bias, which small steps move; '': the origin's, or float32, since
      anything else would round what was trained.

  Raises:
    ConfigError: no such family or dtype, or files of the family cannot hold the model; or several families' can.
  """
  check(
    f'--family={wanted!r} is not one of {sorted(FAMILIES)}'
    if wanted and wanted not in FAMILIES
    else '',
    f'--dtype={dtype!r} is not one of {sorted(EXPORT_DTYPES)}'
    if dtype and dtype not in EXPORT_DTYPES
    else '',
  )
  if origin and wanted and FAMILIES[wanted] is not family_of(origin.config):
    origin = None
  if origin:
    known = family_of(origin.config)
    config, made_of = _written(known, cfg.model, _kept(known, origin.config))
    config = _unchanged(known, cfg.model, origin, config) or config
  else:
    candidates = [FAMILIES[wanted]] if wanted else [*FAMILIES.values()]
    known, config, made_of = _chosen(candidates, cfg.model, _said_of(cfg, eod_id))
  copies = repeated(cfg.model, made_of)
  if origin:
    copies = {copy: name for copy, name in copies.items() if copy in origin.copies}
  names = {part.name: path for path, parts in made_of.items() for part in parts} | copies
  dtypes = {
    name: 'F32' if path == 'router.bias' else EXPORT_DTYPES[dtype or 'float32']
    for name, path in names.items()
  }
  if origin and not dtype:
    dtypes = {
      name: origin.other_dtypes[name] if name in origin.other_dtypes else origin.dtype
      for name in names
    }
  if not origin or dtype or origin.dequantised:
    spelling = (
      'dtype' if 'dtype' in config else 'torch_dtype'
    )  # transformers 5 reads both, 4 the older one
    config[spelling] = dtype or ('bfloat16' if origin else 'float32')
  generation = origin.generation_config if origin else {}
  generation = generation or {name: config[name] for name in TOKEN_IDS if name in config}
  return ExportPlan(known, config, generation, made_of, copies, dtypes)


def _said_of(cfg: ExperimentConfig, eod_id: int) -> Json:
  """Keys that no field of the model says, of a run that was not imported."""
  yarn = cfg.model.attention.rope.yarn
  longest = round(yarn.original_length * yarn.factor) if yarn.factor > 1 else cfg.seq_len
  ids = {name: eod_id for name in TOKEN_IDS[:2]} if eod_id >= 0 else {}
  return {'max_position_embeddings': longest} | ids


def _kept(known: Family, config: Json) -> Json:
  """Keys that no field of the model says, and those that say what files hold."""
  return {
    name: config[name]
    for name in KEPT | {row.key for row in known.names.values()}
    if name in config
  }


def _written(known: Family, cfg: ModelConfig, kept: Json) -> tuple[Json, MadeOf]:
  config = config_json(known, cfg, kept)
  return config, tensors(known.names, cfg, config, leaves(cfg))


def _unchanged(known: Family, cfg: ModelConfig, origin: Origin, written: Json) -> Json:
  """The origin's config.json, if that is what the model still is; {} if not."""
  # Files may lack the layers of multi-token prediction that their config.json speaks of; then the import has none.
  before = dataclasses.replace(read_config(known, origin.config), mtp_depth=cfg.mtp_depth)
  if config_json(known, before, _kept(known, origin.config)) != written:
    return {}
  return {name: value for name, value in origin.config.items() if name != 'quantization_config'}


def _chosen(candidates: list[Family], cfg: ModelConfig, kept: Json) -> tuple[Family, Json, MadeOf]:
  """The only candidate that can hold the model."""
  able: dict[str, tuple[Family, Json, MadeOf]] = {}
  problems: dict[str, ConfigError] = {}
  for known in candidates:
    try:
      able[known.model_type] = known, *_written(known, cfg, kept)
    except ConfigError as error:
      problems[known.model_type] = error
  if not able:
    raise ConfigError(
      'no family here has files that can hold this model:'
      if len(candidates) > 1
      else 'files of this family cannot hold this model:',
      *(f'  {name}: {problem}' for name, error in problems.items() for problem in error.problems),
    )
  check(
    f'this model can be published as {" or ".join(sorted(able))}: choose one with --family='
    if len(able) > 1
    else ''
  )
  [found] = able.values()
  return found


ORIGIN_FILE = 'huggingface.json'  # an Origin, beside the files of a run


def export_model(workdir: str, out: str, wanted: str = '', dtype: str = '') -> None:
  """Writes the newest checkpoint of a run as files that transformers loads: whole, or nothing; see `publish.plan`."""
  expect_room(Path(out))
  start = time.monotonic()
  cfg, tokenizer = read_setup(workdir)
  said = read_json(Path(workdir), ORIGIN_FILE)
  chosen = plan_export(
    cfg, Origin(**said) if said else None, tokenizer.eod_id if tokenizer else -1, wanted, dtype
  )
  step, model, router = read_model_on(jax.local_devices(backend='cpu')[0], workdir, cfg)
  # On the CPU these are views, not copies.
  leaves = {
    path: np.asarray(leaf)
    for path, leaf in zip(chosen.made_of, [*flatten(model).values(), router.bias], strict=True)
  }
  check(*lost(chosen.known, chosen.config, chosen.made_of, leaves))
  files = {CONFIG_FILE: chosen.config, GENERATION_FILE: chosen.generation_config}
  texts = {name: json.dumps(content, indent=2) + '\n' for name, content in files.items()}
  todo = tensor_specs(chosen.made_of, leaves, chosen.copies, chosen.dtypes)
  with progress_bar('writing', sum(spec.nbytes for spec in todo)) as advance:
    write_tensors(
      out,
      [with_progress(spec, advance) for spec in todo],
      texts | ({TOKENIZER_FILE: tokenizer.json_text} if tokenizer else {}),
    )
  say(
    f'exported step {step} of {workdir} to {out} as {chosen.config["model_type"]} '
    f'in {time.monotonic() - start:.1f} s'
  )


def with_progress(spec: Spec, advance: Callable[[int], object]) -> Spec:
  """The tensor, which tells that it is being written."""

  def load() -> np.ndarray:
    advance(spec.nbytes)
    return spec.load()

  return spec._replace(load=load)
