"""The mesh and the one table of axes; without a mesh nothing is laid out."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.transformer import Transformer
from moejax.moe.experts.ffn import SwiGLU
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.logical_axes import (
  RULES,
  constrain,
  param_spec,
  platform,
  row_shards,
  spec,
  sum_row_shards,
)
from moejax.sharding.mesh import MESH_AXES, MeshConfig, make_mesh, product_problem
from moejax.sharding.params import is_param, normal_init, param, param_axes, shardings
from moejax.sharding.tree import size

CONFIG = ModelConfig(
  vocab_size=32,
  d_model=16,
  num_layers=3,
  num_dense_layers=1,
  d_ff=16,
  attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
  moe=MoEConfig(router=RouterConfig(num_experts=4, top_k=2), d_expert=8, num_shared=1),
)
MIXED = MeshConfig(1, fsdp=2, expert=2, tensor=2)


@pytest.fixture(scope='module')
def model() -> Transformer:
  return jax.eval_shape(lambda key: Transformer(key, CONFIG), jax.random.key(0))


def parameters(model: Transformer) -> list[nnx.Param]:
  return [p for p in jax.tree.leaves(model, is_leaf=is_param) if is_param(p)]


def test_the_table_covers_every_axis_that_a_parameter_has(model: Transformer) -> None:
  used = {axis for p in parameters(model) for axis in p.get_metadata('axes')}
  assert used == {'vocab', 'embed', 'heads', 'mlp', 'expert', 'norm', ''}
  assert used <= {*RULES, ''}
  assert {axis for axes in RULES.values() for axis in axes} == {*MESH_AXES}, (
    'each mesh axis splits something'
  )


def test_specs() -> None:
  assert spec('batch', 'sequence', 'embed') == P(('data', 'fsdp', 'expert'), None, ('fsdp',))
  assert spec('', 'mlp') == P(None, ('tensor',)) and spec() == P()
  with pytest.raises(KeyError):
    spec('btach')


def test_a_stack_of_layers_has_the_layer_axis_in_front(model: Transformer) -> None:
  assert model.blocks.moe.experts.gate.shape == (2, 4, 16, 8)

  def spec_of(param: nnx.Param) -> P:
    return param_spec(param_axes(param), param.shape, {'fsdp': 3, 'expert': 2, 'tensor': 2})

  gate = spec_of(model.blocks.moe.experts.gate)
  assert gate == P(None, ('expert',), ('fsdp',), ('tensor',))
  assert spec_of(model.blocks.attention.out.w) == P(None, ('tensor',), ('fsdp',))
  assert spec_of(model.dense_blocks.ffn.down) == P(None, ('tensor',), ('fsdp',))
  assert spec_of(model.blocks.moe.router) == P(None, ('fsdp',), None), (
    'each device must see all experts'
  )
  assert spec_of(model.norm.scale) == P(None)
  assert spec_of(model.embed.table) == P(('tensor',), ('fsdp',))
  twice = jax.eval_shape(
    lambda keys: jax.vmap(jax.vmap(lambda key: SwiGLU(key, 4, 8, 1.0)))(keys),
    jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (2, 3))),
  )
  assert spec_of(twice.up) == P(None, None, ('fsdp',), ('tensor',))


@pytest.mark.parametrize(
  ('fsdp', 'expert', 'experts', 'embed'),
  [
    (2, 2, ('expert', 'fsdp'), None),
    (4, 1, ('expert', 'fsdp'), None),
    (8, 1, ('expert',), ('fsdp',)),
    (3, 1, ('expert',), ('fsdp',)),
    (1, 4, ('expert', 'fsdp'), None),
  ],
)
def test_fsdp_splits_experts_where_they_divide_and_their_embed_elsewhere(
  model: Transformer, fsdp: int, expert: int, experts: tuple[str, ...], embed: tuple[str] | None
) -> None:
  """Four experts; what is not a stack of experts with an `embed` lies as ever."""
  sizes, stack = {'fsdp': fsdp, 'expert': expert, 'tensor': 1}, model.blocks.moe.experts
  gate, down = (param_spec(param_axes(p), p.shape, sizes) for p in (stack.gate, stack.down))
  assert gate == P(None, experts, embed, ('tensor',))
  assert down == P(None, experts, ('tensor',), embed)
  assert param_spec(('expert', 'norm'), (4, 8), sizes) == P(('expert',), None)


def test_shardings_of_a_tree_follow_its_parameters(model: Transformer) -> None:
  mesh = make_mesh(MIXED)
  tree = {'model': model, 'count': jnp.zeros(()), 'load': jnp.zeros((2, 4))}
  found = shardings(tree, mesh)
  assert jax.tree.structure(found) == jax.tree.structure(tree)
  assert found['count'] == found['load'] == NamedSharding(mesh, P())
  for p, where in zip(parameters(model), jax.tree.leaves(found['model']), strict=True):
    assert where == NamedSharding(mesh, param_spec(param_axes(p), p.shape, mesh.shape))
    where.shard_shape(p.shape)  # raises where the sizes do not divide


@pytest.mark.parametrize(
  ('cfg', 'shape'),
  [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(fsdp=2), (4, 2, 1, 1)),
    (MIXED, (1, 2, 2, 2)),
    (MeshConfig(expert=8), (1, 1, 8, 1)),
  ],
  ids=str,
)
def test_data_takes_what_the_others_leave(cfg: MeshConfig, shape: tuple[int, ...]) -> None:
  mesh = make_mesh(cfg)
  assert mesh.shape == dict(zip(MESH_AXES, shape)) and mesh.axis_names == MESH_AXES
  assert row_shards() == 1, 'without a mesh'
  with jax.set_mesh(mesh):
    assert row_shards() == shape[0] * shape[1] * shape[2]
    x = jax.device_put(np.zeros((8, 2)), NamedSharding(mesh, spec('batch')))
    assert len({str(shard.index) for shard in x.addressable_shards}) == row_shards()


@pytest.mark.parametrize(
  ('cfg', 'embed'),
  [(MeshConfig(1, fsdp=4, expert=2), 8), (MIXED, 8), (MeshConfig(1, fsdp=8), 12)],
  ids=['fsdp and expert', 'with tensor', 'embed is not divided'],
)
def test_row_shards_are_summed_piece_by_piece(cfg: MeshConfig, embed: int) -> None:
  mesh = make_mesh(cfg)
  with jax.set_mesh(mesh):
    parts = np.random.default_rng(0).integers(0, 9, (row_shards(), embed, 6)).astype(np.float32)
    in_parts = jax.device_put(parts, NamedSharding(mesh, spec('batch', '', 'vocab')))
    compiled = jax.jit(lambda x: sum_row_shards(x, 'embed', 'vocab')).lower(in_parts).compile()
    total = compiled(in_parts)
  np.testing.assert_array_equal(total, parts.sum(0))
  if embed % cfg.fsdp:
    return
  assert total.sharding.is_equivalent_to(NamedSharding(mesh, spec('embed', 'vocab')), 2)
  # XLA for CPUs has no reduce-scatter: its first sum is an all-reduce of [1, 1, embed, 6].
  reduced = re.findall(r'f32\[(\d+),\d+\]\S* all-reduce\(', compiled.as_text())
  pieces = {int(rows) for rows in reduced}
  assert pieces <= {embed // cfg.fsdp}, 'over the other axes, pieces are summed'


def test_a_mesh_over_some_of_the_devices() -> None:
  assert make_mesh(MeshConfig(fsdp=2), jax.devices()[:4]).shape['data'] == 2
  assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1
  assert [*make_mesh(MeshConfig(3, expert=2)).devices.flat] == jax.devices()[:6], (
    'data is given: the first of them'
  )


def test_processes_without_a_device_in_the_mesh_are_refused() -> None:
  apart = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
  assert 'but there are 8 devices' in product_problem(MeshConfig(2, expert=2), apart)
  assert not product_problem(MeshConfig(2, expert=4), apart)
  assert not product_problem(MeshConfig(2, expert=2), apart[:4] + apart[:2])


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (MeshConfig(fsdp=3), 'data=2 * fsdp=3 * expert=1 * tensor=1 = 6, but there are 8 devices'),
    (MeshConfig(3, expert=3), 'data=3 * fsdp=1 * expert=3 * tensor=1 = 9, but there are 8 devices'),
    (MeshConfig(tensor=16), 'data=1 * fsdp=1 * expert=1 * tensor=16 = 16, but there are 8 devices'),
  ],
  ids=str,
)
def test_a_mesh_that_does_not_fit_names_all_its_sizes(cfg: MeshConfig, told: str) -> None:
  with pytest.raises(ConfigError) as error:
    make_mesh(cfg)
  assert told in str(error.value) and 'use sizes whose product is 8' in str(error.value)


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    MeshConfig(-1, fsdp=0, expert=-2, tensor=0)
  fields = [problem.split(':')[0] for problem in error.value.problems]
  assert fields == ['data=-1', 'fsdp=0', 'expert=-2', 'tensor=0']


def test_constraints_do_nothing_where_there_is_no_mesh_or_one_device() -> None:
  x = jnp.zeros((8, 4))
  constrained = functools.partial(constrain, x, 'batch', 'mlp')
  assert constrained() is x
  with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
    assert constrained() is x
  mesh = make_mesh(MIXED)
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: constrain(x, 'batch', 'mlp'))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec('batch', 'mlp')), 2)
    odd = jax.jit(lambda x: constrain(x, 'batch', 'mlp'))(jnp.zeros((8, 3)))
    assert odd.sharding.is_equivalent_to(NamedSharding(mesh, spec('batch', '')), 2), (
      'what does not divide stays whole'
    )


def test_the_platform_is_that_of_the_program_also_for_absent_chips() -> None:
  assert platform() == jax.default_backend() == 'cpu'
  for absent in ('tpu', 'gpu'):
    device = AbstractDevice(device_kind='absent', num_cores=1, platform=absent)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=device)):
      assert platform() == absent


def test_size_counts_the_numbers_of_all_leaves() -> None:
  five = param(jax.random.key(0), (5,), ('norm',), normal_init(1.0))
  tree = {'a': jnp.zeros((2, 3)), 'b': (jnp.zeros(()), five)}
  assert size(tree) == 6 + 1 + 5
