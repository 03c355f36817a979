"""How micro-batches lie on a mesh; what they add up to is in test_step.py."""

import jax
import pytest

from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.plan.hlo.collectives import collectives
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.gradient_accumulation import gradients
from tests.support.quick import QUICK


@pytest.mark.slow
def test_micro_batches_are_spread_before_they_are_embedded() -> None:
  """A device holds rows of one micro-batch in four. As activations they would be sent around in every layer."""
  parts = 4
  model = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=1,
    attention=AttentionConfig(d_head=8),
    moe=MoEConfig(d_expert=16, dispatch=DispatchConfig('dense_matmul')),
  )
  cfg = ExperimentConfig(
    batch_size=8 * parts,
    seq_len=16,
    micro_batches=parts,
    model=model,
    mesh=MeshConfig(data=1, fsdp=2, expert=4),
  )
  mesh = make_run_mesh(cfg)
  with jax.set_mesh(mesh):
    state, batch = sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh)
    program = (
      jax.jit(lambda state, batch: gradients(state, batch, cfg)).lower(state, batch).compile(QUICK)
    )
    found = collectives(program.as_text(), mesh.shape)
  everywhere = {c.kind: c.count for c in found if c.axes == ('fsdp', 'expert')}
  # The CPU's compiler, and no chip's, gathers scores for top-k: twice a layer.
  assert everywhere['all-gather'] <= 2 * parts and everywhere['collective-permute'] <= 2 * len(
    batch
  )
