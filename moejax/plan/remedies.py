"""What may be changed in a config whose step does not fit: remat, micro-batches, the mesh."""

import contextlib
import dataclasses

from moejax.config import ConfigError
from moejax.plan.search import REMATS
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import divided_parts


def remedy_configs(cfg: ExperimentConfig) -> dict[str, ExperimentConfig]:
  """Returns flags -> the config with them, for every change that the model and the batch allow.

  The changes are a remat policy that keeps less, smaller micro-batches, and fsdp doubled at the
  cost of another axis.
  """
  changes: dict[str, dict[str, object]] = {}
  for remat in REMATS[: REMATS.index(cfg.model.remat)]:
    model = dataclasses.replace(cfg.model, remat=remat)
    changes[f'--config.model.remat={remat}'] = {'model': model}
  for number in larger_micro_batch_counts(cfg):
    changes[f'--config.micro_batches={number}'] = {'micro_batches': number}
  for axis in ('data', 'tensor'):
    size, fsdp = getattr(cfg.mesh, axis), 2 * cfg.mesh.fsdp
    if size and size % 2 == 0:
      flags = f'--config.mesh.{axis}={size // 2} --config.mesh.fsdp={fsdp}'
      changes[flags] = {'mesh': double_fsdp(cfg.mesh, axis)}
  configs: dict[str, ExperimentConfig] = {}
  for flags, change in changes.items():
    # A change may break a rule of the config, such as balance.ep_groups, which must go with
    # micro_batches.
    with contextlib.suppress(ConfigError):
      other = dataclasses.replace(cfg, **change)
      is_divided = not any(part.problem(other.mesh) for part in divided_parts(other))
      if other != cfg and is_divided:
        configs[flags] = other
  return configs


def larger_micro_batch_counts(cfg: ExperimentConfig) -> list[int]:
  """Returns the numbers of micro-batches above the config's that divide the batch, smallest first.

  The rows of a micro-batch are a multiple of the devices that they are split over.
  """
  shards = cfg.mesh.data * cfg.mesh.fsdp * cfg.mesh.expert
  rows = range(shards, cfg.batch_size // cfg.micro_batches, shards)
  return [cfg.batch_size // n for n in reversed(rows) if cfg.batch_size % n == 0]


def double_fsdp(mesh: MeshConfig, axis: str) -> MeshConfig:
  """Returns the mesh with half of an axis given to fsdp, so that parameters are cut smaller."""
  half = {axis: getattr(mesh, axis) // 2}
  return dataclasses.replace(mesh, fsdp=2 * mesh.fsdp, **half)
