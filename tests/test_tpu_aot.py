"""The tiny training step compiled for TPU slices that are not here, and what is in the program.

Each program is compiled once; several tests look at it. Widths are multiples of 128, as the tiles of a TPU are.
"""
from collections.abc import Iterator
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
import pytest

from moejax.attention import AttentionConfig, LatentConfig
from moejax.experiment import ExperimentConfig
from moejax.meshes import mesh_of
from moejax.moe.dispatch import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.programs import batch_of
from moejax.sharding import MeshConfig
from moejax.start import target_of
from moejax.step import compile_step
from moejax.transformer import ModelConfig

pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed: pip install "moejax[tpu]"')]

SLICES = {'v5e': 'v5e:2x4', 'v5p': 'v5p:2x2x2', 'v6e': 'v6e:2x4'}   # eight devices each
E, K, D, F = 8, 2, 256, 384
MODEL = ModelConfig(
  vocab_size=512, d_model=D, num_layers=1, d_ff=D, dtype='bfloat16', remat='full',
  attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=128),
  moe=MoEConfig(d_expert=F, router=RouterConfig(num_experts=E, top_k=K)))
LATENT = dataclasses.replace(
  MODEL, mtp_depth=1, sandwich_norm=True,
  attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=128,
                            latent=LatentConfig(kv_rank=128, q_rank=256, d_rope=64, d_value=128)))
# Sinks, windows and biases everywhere, as gpt-oss has them.
BIASED = dataclasses.replace(
  MODEL, num_layers=2,
  attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=128, windows=(64, 0), sinks=True, qkv_bias=True,
                            out_bias=True),
  moe=dataclasses.replace(MODEL.moe, activation='clamped_swiglu', expert_bias=True,
                          router=RouterConfig(num_experts=E, top_k=K, logit_bias=True, weigh='softmax')))


class Case(NamedTuple):
  """A step, and where it is to run."""

  slice: str
  dispatch: DispatchConfig
  model: ModelConfig = MODEL


SPARSE, DENSE, BUFFERS = (DispatchConfig(), DispatchConfig('dense_matmul'), DispatchConfig('dense_matmul', 2.0))
CASES = {
  'v5e sparse': Case('v5e', SPARSE),
  'v5e dense': Case('v5e', DENSE),
  'v5e buffers': Case('v5e', BUFFERS),
  'v5p sparse': Case('v5p', SPARSE, LATENT),
  'v5p dense': Case('v5p', DENSE),
  'v5p buffers': Case('v5p', BUFFERS),
  'v6e sparse': Case('v6e', SPARSE, BIASED),
  'v6e dense': Case('v6e', DENSE),
  'v6e buffers': Case('v6e', BUFFERS),
}


@pytest.fixture(scope='module', autouse=True)
def no_cache() -> Iterator[None]:
  """The compilation cache would keep these programs, and cannot read them back without a chip."""
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@functools.cache
def devices(name: str) -> list[jax.Device]:
  """Of a slice that is not here."""
  # No chip is touched: there is no metadata server to ask, and nothing that a lock would protect.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  return list(topologies.get_topology_desc(topology_name=SLICES[name], platform='tpu').devices)


class Program(NamedTuple):
  """A compiled step."""

  text: str
  leaves: int   # arrays of the state

  def results(self, *ops: str) -> list[list[tuple[int, ...]]]:
    """The shapes that each of these operations gives."""
    found = re.findall(rf'= (.*?) (?:{"|".join(ops)})\(', self.text)
    return [[tuple(map(int, filter(None, sizes.split(',')))) for sizes in re.findall(r'\w\[([\d,]*)\]', result)]
            for result in found]


@functools.cache
def program(name: str) -> Program:
  """Of sixteen rows, on expert=4 x fsdp=2."""
  case = CASES[name]
  model = dataclasses.replace(case.model, moe=dataclasses.replace(case.model.moe, dispatch=case.dispatch))
  cfg = ExperimentConfig(batch_size=16, seq_len=128, model=model, mesh=MeshConfig(data=1, fsdp=2, expert=4))
  mesh = mesh_of(cfg, devices(case.slice))
  with jax.set_mesh(mesh):
    target = target_of(cfg, mesh)
    return Program(compile_step(cfg, target, batch_of(cfg, mesh)).as_text(), len(jax.tree.leaves(target)))


@pytest.mark.parametrize('name', CASES)
def test_the_step_of_a_slice(name: str) -> None:
  """It compiles, the state's memory becomes the new state's, and no device is sent the experts of others."""
  text, leaves = program(name)
  aliases = re.findall(r'\{(\d+)\}: \((\d+), \{\}', text.partition('\n')[0])
  assert aliases == [(str(i), str(i)) for i in range(leaves)]
  gathered = program(name).results('all-gather', 'all-gather-start')
  assert gathered
  # All experts' projections of one kind are more than anything else that is gathered.
  assert max(math.prod(shape) for shapes in gathered for shape in shapes) < E * D * F
