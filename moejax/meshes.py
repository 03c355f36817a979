"""The mesh of a run: what the config asks for, held against the devices, the model and the batch."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from moejax.config import check
from moejax.experiment import ExperimentConfig
from moejax.sharding import make_mesh


def mesh_of(cfg: ExperimentConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """The mesh that cfg.mesh asks for, over these devices ((): all there are).

  Raises:
    ConfigError: it does not divide the devices, the rows of a micro-batch or the experts.
  """
  mesh = make_mesh(cfg.mesh, devices)
  shards = mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert']
  rows, experts = cfg.batch_size // cfg.micro_batches, cfg.model.moe.router.num_experts
  check(
    f'config.batch_size / micro_batches = {rows} rows do not divide over data * fsdp * expert = {shards} devices: '
    f'use a multiple of {shards * cfg.micro_batches} for batch_size' if rows % shards else '',
    f'config.model.moe.router.num_experts={experts} do not divide over mesh.expert={mesh.shape["expert"]}: '
    'use a divisor' if experts % mesh.shape['expert'] else '',
  )
  return mesh
