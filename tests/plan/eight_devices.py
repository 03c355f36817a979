"""A small experiment planned for eight devices of the CPU, which stand in for those of any chip."""

import dataclasses

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.plan.topology import Topology, parse_topology
from moejax.runtime.chips import CHIPS
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig

CPU_8 = parse_topology('cpu:8')
CONFIG = ExperimentConfig(
  seq_len=128,
  batch_size=32,
  mesh=MeshConfig(1, 2, 4),
  model=ModelConfig(
    vocab_size=512,
    d_model=128,
    num_layers=4,
    remat='full',
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, d_head=32),
    moe=MoEConfig(RouterConfig(8, 2), d_expert=128),
  ),
)
SECTIONS = (
  'parameters',
  'active',
  'FLOP a token',
  'optimiser',
  'gradients',
  'activations',
  'other temporaries',
  'collectives of one step',
  'all-gather',
  'fsdp',
)


def changed(remat: str = 'full', micro_batches: int = 1, **mesh: int) -> ExperimentConfig:
  """CONFIG with another plan."""
  return dataclasses.replace(
    CONFIG,
    mesh=MeshConfig(**mesh),
    micro_batches=micro_batches,
    model=dataclasses.replace(CONFIG.model, remat=remat),
  )


def eight_chips(name: str, compiler: str = 'cpu', **limits: float) -> Topology:
  """Eight devices of a chip, which the CPU's stand in for."""
  return parse_topology('v5e:2x4')._replace(chip=CHIPS[name]._replace(**limits), compiler=compiler)
