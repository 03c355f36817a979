"""The tiny training step compiled ahead of time for TPU slices, and what is in the program.

Each program is compiled once; several tests look at it. Widths are multiples of 128, as the tiles
of a TPU are.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from moejax.config import ConfigError
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_step import compile_step
from tests.support.absent_chips import needs_compiler

pytestmark = needs_compiler('libtpu')

E, K, D, F = 8, 2, 256, 384
MODEL = ModelConfig(
  vocab_size=512,
  d_model=D,
  num_layers=1,
  d_ff=D,
  dtype='bfloat16',
  remat='full',
  attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=128),
  moe=MoEConfig(d_expert=F, router=RouterConfig(num_experts=E, top_k=K)),
)
LATENT = dataclasses.replace(
  MODEL,
  mtp_depth=1,
  sandwich_norm=True,
  attention=AttentionConfig(
    num_heads=2,
    num_kv_heads=2,
    d_head=128,
    latent=LatentConfig(kv_rank=128, q_rank=256, d_rope=64, d_value=128),
  ),
)
# Sinks, windows and biases everywhere, as gpt-oss has them.
BIASED = dataclasses.replace(
  MODEL,
  num_layers=2,
  attention=AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    d_head=128,
    windows=(64, 0),
    sinks=True,
    qkv_bias=True,
    out_bias=True,
  ),
  moe=dataclasses.replace(
    MODEL.moe,
    activation='clamped_swiglu',
    expert_bias=True,
    router=RouterConfig(num_experts=E, top_k=K, logit_bias=True, weigh='softmax'),
  ),
)


class Case(NamedTuple):
  """A step, and where it is to run."""

  slice: str
  dispatch: DispatchConfig
  model: ModelConfig = MODEL


GATHER, RAGGED, DENSE, BUFFERS = (
  DispatchConfig(exchange='gather'),
  DispatchConfig(exchange='ragged'),
  DispatchConfig('dense_matmul'),
  DispatchConfig('dense_matmul', 2.0),
)
EXCHANGES = {'gather': GATHER, 'ragged': RAGGED, 'dense': DENSE, 'buffers': BUFFERS}
SLICES = {'v5e': 'v5e:2x4', 'v5p': 'v5p:2x2x2', 'v6e': 'v6e:2x4'}
CASES = {
  f'{name} {how}': Case(slice, dispatch)
  for name, slice in SLICES.items()
  for how, dispatch in EXCHANGES.items()
} | {
  'v5p gather': Case('v5p:2x2x2', GATHER, BIASED),
  'v5p ragged': Case('v5p:2x2x2', RAGGED, LATENT),
}
MOVED = {GATHER: set(), RAGGED: {'ragged-all-to-all'}, DENSE: set(), BUFFERS: {'all-to-all'}}


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
  """The devices of a slice, which the machine need not have."""
  # No chip is touched: there is no metadata server to ask, and nothing that a lock would protect.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1')
  return list(topologies.get_topology_desc(topology_name=name, platform='tpu').devices)


class Program(NamedTuple):
  """A compiled step."""

  text: str
  leaves: int  # arrays of the state

  def results(self, *ops: str) -> list[list[tuple[int, ...]]]:
    """The shapes that each of these operations gives."""
    results = re.findall(rf'= (.*?) (?:{"|".join(ops)})\(', self.text)
    return [list(map(shape_of, re.findall(r'\w\[([\d,]*)\]', result))) for result in results]


def shape_of(sizes: str) -> tuple[int, ...]:
  """(2, 4) of '2,4', () of ''."""
  return tuple(map(int, filter(None, sizes.split(','))))


def compiled(case: Case, sizes: MeshConfig, rows: int) -> Program:
  """The step of so many rows on this mesh."""
  model = dataclasses.replace(
    case.model, moe=dataclasses.replace(case.model.moe, dispatch=case.dispatch)
  )
  cfg = ExperimentConfig(batch_size=rows, seq_len=128, model=model, mesh=sizes)
  mesh = make_run_mesh(cfg, devices(case.slice))
  with jax.set_mesh(mesh):
    target = sharded_state_shapes(cfg, mesh)
    text = compile_step(cfg, target, batch_shapes(cfg, mesh)).as_text()
  return Program(text, len(jax.tree.leaves(target)))


@pytest.mark.parametrize('name', CASES)
def test_the_step_of_a_slice(name: str) -> None:
  """Experts over four devices, two of them on each; compiled once, and looked at for all of it."""
  case = CASES[name]
  this = compiled(case, MeshConfig(data=1, fsdp=2, expert=4), 16)
  # The state's memory becomes the new state's.
  aliases = re.findall(r'\{(\d+)\}: \((\d+), \{\}', this.text.partition('\n')[0])
  assert aliases == [(str(i), str(i)) for i in range(this.leaves)]
  # No device is sent the experts of others: all projections of one kind are more than anything else
  # that is gathered.
  gathered = this.results('all-gather', 'all-gather-start')
  assert gathered and max(math.prod(shape) for shapes in gathered for shape in shapes) < E * D * F
  # Tokens go over `expert` as the config says, and no other way.
  moved = {
    op for op in ('all-to-all', 'ragged-all-to-all') if re.search(rf' {op}(-start)?\(', this.text)
  }
  assert moved == MOVED[case.dispatch]
  # Attention is a kernel, forward and backward; and so is the grouped matmul, with both of its
  # gradients.
  assert {*re.findall(r'%splash_mha_([a-z]+)_\S+ = .* custom-call\(', this.text)} == {
    'fwd',
    'dq',
    'dkv',
  }
  kernels = re.findall(
    r'%ragged-dot-none\S* = (\w+\[[\d,]*\]).* custom-call\(.*op_name="([^"]*)"', this.text
  )
  grouped = {('transpose' in op, shape) for shape, op in kernels}
  rows = 8 * 128 * K // 4 * 5 // 4  # a quarter more than a device of a group of four is given
  products = {f'bf16[{rows},{F}]', f'bf16[{rows},{D}]'}
  expected = {(backward, product) for backward in (False, True) for product in products}
  expected |= {(True, f'bf16[{E // 4},{D},{F}]'), (True, f'bf16[{E // 4},{F},{D}]')}
  if case.dispatch.dispatcher == 'dense_matmul':
    expected = set()
  assert grouped == expected


def test_a_slice_without_the_ragged_exchange_refuses_it() -> None:
  with pytest.raises(
    ConfigError, match="dispatch.exchange='ragged': no ragged_all_to_all on 64 x TPU v5 lite"
  ):
    compiled(Case('v5e:8x8', RAGGED), MeshConfig(data=1, fsdp=16, expert=4), 64)
