"""Exchanges over the `expert` axis: what moves, what is chosen, and that expert weights stay where they are."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.dispatch import dispatchers as dispatch
from moejax.moe.dispatch.dispatchers import (
  DISPATCHERS,
  DispatchConfig,
  exchange_of,
  exchanges,
  group_of,
)
from moejax.moe.dispatch.exchange import layout, move
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.weights import Weights
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.plan.hlo.collectives import collectives, walk
from moejax.plan.hlo.program import array_bytes, parse_program
from moejax.plan.hlo.replica_groups import axes_of, groups_of
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import exchange_summary
from moejax.train.experiment.summary import exchange_lines, human
from moejax.train.shapes import batch_shapes, sharded_state_shapes
from moejax.train.step.train_step import train_step
from tests.support.emulated_exchange import emulate
from tests.support.quick import QUICK

FOUR = MeshConfig(1, fsdp=2, expert=4)
MIXED = MeshConfig(2, expert=2, tensor=2)
WAYS = [
  DispatchConfig('dense_matmul'),
  DispatchConfig('dense_matmul', 1.5),
  DispatchConfig(exchange='gather'),
  DispatchConfig(exchange='ragged'),
]
PRIME = 11  # divides the width of an expert's hidden layer, and nothing else


def name_of(cfg: DispatchConfig) -> str:
  return (
    f'{cfg.dispatcher}-{cfg.capacity_factor}-{cfg.exchange}'
    if isinstance(cfg, DispatchConfig)
    else str(cfg)
  )


def experiment(cfg: DispatchConfig, mesh: MeshConfig) -> ExperimentConfig:
  model = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=1,
    d_ff=16,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
    moe=MoEConfig(RouterConfig(8, 2), cfg, d_expert=2 * PRIME, expert_bias=True),
  )
  return ExperimentConfig(batch_size=8, seq_len=6, model=model, mesh=mesh)


def compiled_step(cfg: ExperimentConfig) -> str:
  mesh = make_mesh(cfg.mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(functools.partial(train_step, cfg=cfg))
    return (
      step.lower(sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh)).compile(QUICK).as_text()
    )


def axes_of_expert_weights(text: str, mesh: Mapping[str, int]) -> set[tuple[str, str]]:
  """(kind, axis) of every collective, in a whole program, whose result is as large as a part of experts' weights."""
  computations, entry = parse_program(text)
  return {
    (instruction.op, axis)
    for _, instruction, _ in walk(computations, entry)
    for axis in axes_of(groups_of(instruction.rest, 8), mesh)
    if any(size % PRIME == 0 for size in array_bytes(instruction.shape))
  }


@pytest.mark.parametrize(
  'cfg',
  [cfg if cfg.exchange == 'gather' else pytest.param(cfg, marks=pytest.mark.slow) for cfg in WAYS],
  ids=name_of,
)
def test_expert_weights_are_not_gathered_over_the_expert_axis(
  cfg: DispatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Nor sent over it in any other way; over fsdp they are, which shows that they would be seen."""
  emulate(monkeypatch)
  text = compiled_step(experiment(cfg, FOUR))
  seen = axes_of_expert_weights(text, make_mesh(FOUR).shape)
  assert ('all-gather', 'fsdp') in seen and 'expert' not in {axis for _, axis in seen}


@pytest.mark.slow
@pytest.mark.parametrize('cfg', WAYS, ids=name_of)
def test_nor_where_their_hidden_layer_is_split_too(
  cfg: DispatchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  emulate(monkeypatch)
  seen = axes_of_expert_weights(compiled_step(experiment(cfg, MIXED)), make_mesh(MIXED).shape)
  assert {axis for _, axis in seen} == {'data'}


def test_weights_that_are_gathered_over_the_expert_axis_are_seen(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  def whole(experts: Weights) -> Weights:
    return jax.tree.map(lambda spec: P(None, *spec[1:]), layout(experts))

  monkeypatch.setattr(dispatch, 'layout', whole)
  seen = axes_of_expert_weights(compiled_step(experiment(WAYS[0], FOUR)), make_mesh(FOUR).shape)
  assert ('all-gather', 'expert') in seen


def test_moved_rows_lie_in_the_order_of_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
  """And their gradients go the way back. Some send nothing to some, one gets nothing from anybody."""
  emulate(monkeypatch)
  to = np.array([[2, 0, 3, 0], [0, 1, 1, 0], [4, 0, 0, 0], [1, 2, 0, 0]], np.int32)
  sent, room, width = (
    6,
    7,
    3,
  )  # rows that each has, of which the first to.sum(1) are sent; the most that one gets
  rows, d = (
    np.random.default_rng(0).normal(size=(4, n, width)).astype(np.float32) for n in (sent, room)
  )
  want, want_back = np.zeros_like(d), np.zeros_like(rows)
  at_receiver = [0] * 4
  for source in range(4):
    at = 0
    for receiver, count in enumerate(to[source]):
      there, at_receiver[receiver] = at_receiver[receiver], at_receiver[receiver] + count
      want[receiver, there : there + count] = rows[source, at : at + count]
      want_back[source, at : at + count] = d[receiver, there : there + count]
      at += count

  def both(rows: Array, d: Array, to: Array) -> tuple[Array, Array]:
    y, pull = jax.vjp(lambda rows: move(rows, to, room), rows)
    return y, *pull(d)

  mesh = make_mesh(MeshConfig(1, expert=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    spread = jax.shard_map(both, in_specs=(P('expert'), P('expert'), P()), out_specs=P('expert'))
    got = jax.jit(spread, compiler_options=QUICK)(rows.reshape(-1, width), d.reshape(-1, width), to)
  for a, b in zip(got, (want, want_back)):
    np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)


def layer(
  cfg: DispatchConfig, mesh: Mesh
) -> tuple[Callable[..., Array], tuple[jax.ShapeDtypeStruct | Weights, ...]]:
  """A dispatcher on 8 x 6 tokens of 16 channels, K 2, E 8, and the shapes of its arguments."""
  rows, experts = (P(RULES['batch']), layout(Weights(*np.zeros((3, 1, 1, 1)))))

  def shape(spec: P, *shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  def forward(x: Array, weights: Array, stack: Weights, probs: Array, ids: Array) -> Array:
    routing = Routing(probs, probs, probs, ids, weights, ids, weights[..., 0], probs, probs[0])
    return DISPATCHERS[cfg.dispatcher](x, routing, stack, ACTIVATIONS['swiglu'](0.0), cfg)[0]

  stack = Weights(
    *(shape(spec, 8, *wide) for spec, wide in zip(experts, ((16, 22), (16, 22), (22, 16))))
  )
  return forward, (
    shape(rows, 8, 6, 16),
    shape(rows, 8, 6, 2),
    stack,
    shape(rows, 8, 6, 8),
    shape(rows, 8, 6, 2, dtype=jnp.int32),
  )


@pytest.mark.parametrize('cfg', [WAYS[1], WAYS[2]], ids=name_of)
@pytest.mark.parametrize('sizes', [FOUR, pytest.param(MIXED, marks=pytest.mark.slow)], ids=str)
def test_bytes_are_those_of_the_compiled_program(cfg: DispatchConfig, sizes: MeshConfig) -> None:
  """Of both passes twice as many, but for the experts' ids, which have no gradient."""
  mesh = make_mesh(sizes)
  forward, args = layer(cfg, mesh)

  def both(
    x: Array, weights: Array, stack: Weights, probs: Array, ids: Array, dy: Array
  ) -> tuple[Array, tuple[Array, Array, Weights]]:
    y, pull = jax.vjp(lambda *args: forward(*args, probs, ids), x, weights, stack)
    return y, pull(dy)

  group = group_of(cfg, mesh.abstract_mesh, 48, 2, 8, 16, jnp.float32)
  name, ids = exchanges(cfg)[0], (group.devices - 1) * group.tokens * group.top_k * 4
  for f, more, passes in ((forward, (), 1), (both, args[:1], 2)):
    with jax.set_mesh(mesh):
      text = jax.jit(f).lower(*args, *more).compile(QUICK).as_text()
    found = sum(c.bytes for c in collectives(text, mesh.shape) if c.axes == ('expert',))
    assert found == passes * exchange_bytes(group)[name] - (ids if name == 'gather' else 0) * (
      passes - 1
    )


@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_bytes_of_a_ragged_exchange_are_those_of_its_copies(top_k: int) -> None:
  """Four devices of two experts, counted copy by copy: all loads even; all tokens to the first device."""
  devices, tokens, num_experts, row = 4, 8, 8, 16 * 2
  even = (np.arange(devices * tokens * top_k) % num_experts).reshape(devices, tokens, top_k)
  worst = np.stack([np.arange(top_k)] * devices * tokens).reshape(
    even.shape
  )  # 0 and 1 are at home on the first
  counts = (devices - 1) * num_experts * 4
  found = exchange_bytes(Group(devices, tokens, top_k, num_experts, 16, 2, 0))
  for name, ids in (('ragged', even), ('ragged_worst', worst)):
    home = ids // 2
    there, back = (
      (home[1:] == 0).sum(),
      (home[0] != 0).sum(),
    )  # received by the first device: copies, and results
    assert found[name] == there * (row + 4) + back * row + counts, name
  assert 'all_to_all' not in found


@pytest.mark.parametrize(
  ('kind', 'platform', 'devices', 'lacks'),
  [
    ('cpu', 'cpu', 8, True),
    ('TPU v5 lite', 'tpu', 16, False),
    ('TPU v5 lite', 'tpu', 32, True),
    ('TPU v5', 'tpu', 64, False),
    ('TPU v6 lite', 'tpu', 256, False),
    ('NVIDIA H200', 'gpu', 8, False),
  ],
)
def test_where_a_ragged_exchange_can_be_had(
  kind: str, platform: str, devices: int, lacks: bool
) -> None:
  device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  told = lacking_ragged(AbstractMesh((devices,), ('expert',), abstract_device=device))
  assert told == (f'{devices} x {kind}' if lacks else '')


def test_the_ragged_exchange_is_taken_where_it_moves_less() -> None:
  sparse, dense, full = (
    DispatchConfig(),
    DispatchConfig('dense_matmul'),
    DispatchConfig('dense_matmul', 1.0),
  )
  group = Group(devices=4, tokens=64, top_k=2, num_experts=8, d_model=512, itemsize=2, capacity=20)
  many = group._replace(
    top_k=4
  )  # as many copies of a token as devices: a few bytes less are not enough
  some = group._replace(top_k=4)  # hardly less than gather moves, and buffers for twice as many
  assert [exchange_of(sparse, g, '') for g in (group, some, many)] == ['ragged', 'gather', 'gather']
  assert [exchange_of(c, group, '') for c in (dense, full)] == ['gather', 'all_to_all']
  assert exchange_of(sparse, group, '8 x cpu') == 'gather'
  assert exchange_of(DispatchConfig(exchange='ragged'), many, '') == 'ragged'
  with pytest.raises(ConfigError) as error:
    exchange_of(DispatchConfig(exchange='ragged'), group, '8 x cpu')
  assert str(error.value) == (
    "dispatch.exchange='ragged': no ragged_all_to_all on 8 x cpu: use 'auto' or 'gather'"
  )


def traced(cfg: DispatchConfig, sizes: MeshConfig) -> str:
  mesh = make_mesh(sizes)
  forward, args = layer(cfg, mesh)
  with jax.set_mesh(mesh):
    return str(jax.make_jaxpr(forward)(*args))


def test_what_is_traced_is_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
  auto = DispatchConfig()
  assert 'ragged_all_to_all' not in traced(auto, FOUR)
  with pytest.raises(ConfigError, match='no ragged_all_to_all on 8 x cpu'):
    traced(DispatchConfig(exchange='ragged'), FOUR)
  monkeypatch.setattr(dispatch, 'lacking_ragged', lambda mesh: '')
  assert 'ragged_all_to_all' in traced(auto, FOUR)
  alone = traced(auto, MeshConfig(4, fsdp=2))
  assert {*re.findall(r"axis_name=\(?'(\w+)'", alone)} == {'fsdp'}, 'all are at home'


def test_the_summary_says_what_the_step_does() -> None:
  mesh = make_mesh(FOUR).abstract_mesh
  cfg = dataclasses.replace(
    experiment(DispatchConfig('dense_matmul', 1.5), FOUR), batch_size=16, micro_batches=2
  )
  by, each = exchange_summary(cfg, mesh)
  assert by == 'all_to_all' and each == exchange_bytes(Group(4, 6, 2, 8, 16, 4, 3))
  assert [*each] == ['gather', 'ragged', 'ragged_worst', 'all_to_all']
  assert exchange_summary(cfg, make_mesh(MeshConfig()).abstract_mesh) == ('', {})
  (line,) = exchange_lines(
    {'mesh': FOUR.__dict__, 'exchange': {'by': by, 'forward_bytes_per_device_and_layer': each}}
  )
  assert line.startswith('experts over 4 devices, exchange by all_to_all;')
  assert line.endswith(f'all_to_all {human(each["all_to_all"], 1024)}B')
  assert (
    exchange_lines(
      {'mesh': {'expert': 1}, 'exchange': {'by': '', 'forward_bytes_per_device_and_layer': {}}}
    )
    == []
  )
