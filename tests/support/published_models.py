"""Directories of published models for tests: copies of goldens, and random ones of any family."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np

from moejax.families import FAMILIES, config_json
from moejax.families.schema.tensor_names import file_shapes, leaves, tensors
from moejax.hf.safetensors.directory import open_tensors, write_tensors
from moejax.hf.safetensors.file import DTYPES, Spec

GOLDEN = Path(__file__).parents[1] / 'golden'
NAMES = sorted(path.parent.name for path in GOLDEN.glob('*/about.json'))
STORED = {dtype: name for name, dtype in DTYPES.items()}
Arrays = dict[str, np.ndarray]


def copied(name: str, to: Path, config: str = 'config.json') -> Path:
  """A golden's files that a published model has, with its config.json in either spelling."""
  to.mkdir()
  for pattern in ('*.safetensors*', 'generation_config.json'):
    for path in (GOLDEN / name).glob(pattern):
      shutil.copy(path, to)
  shutil.copy(GOLDEN / name / config, to / 'config.json')
  return to


def arrays_in(directory: Path) -> Arrays:
  """All tensors, as they are read."""
  stored = open_tensors(directory)
  return {name: stored.read(name) for name in stored.names}


def written(directory: Path, arrays: Arrays, config: dict, max_shard_bytes: int = 10**9) -> Path:
  """A directory with these tensors and config.json."""
  specs = [Spec(name, a.shape, STORED[a.dtype], lambda a=a: a) for name, a in arrays.items()]
  write_tensors(directory, specs, {'config.json': json.dumps(config)}, max_shard_bytes)
  return directory


def random_model(kind: str, dtype: str, **changes: object) -> tuple[dict, Arrays]:
  """config.json and tensors of a family's tiny preset, changed."""
  known = FAMILIES[kind]
  cfg = dataclasses.replace(known.presets['tiny'], **changes)
  config = config_json(known, cfg, {'bos_token_id': 1, 'eos_token_id': 2})
  shapes = file_shapes(tensors(known.names, cfg, config, leaves(cfg)))
  rng = np.random.default_rng(0)
  return config, {
    name: (0.3 * rng.standard_normal(shape)).astype(DTYPES[dtype]) for name, shape in shapes.items()
  }


def edited(directory: Path, file: str, **values: object) -> None:
  """Changes keys of a JSON file; None takes a key away."""
  content = json.loads((directory / file).read_text())
  for name, value in values.items():
    content[name] = value
    if value is None:
      del content[name]
  (directory / file).write_text(json.dumps(content))
