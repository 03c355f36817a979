"""What an exchange costs, counted in the compiled program and copy by copy, and which is chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh

from moejax.config import ConfigError
from moejax.moe.dispatch.dispatchers import (
  DispatchConfig,
  choose_exchange,
  exchange_group,
  exchanges,
)
from moejax.moe.dispatch.exchange_cost import Group, exchange_bytes, lacking_ragged
from moejax.moe.experts.weights import Weights
from moejax.plan.hlo.collectives import collectives
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.cost import exchange_summary
from moejax.train.experiment.summary import exchange_lines, human
from tests.moe.dispatch.exchange_cases import FOUR, MIXED, WAYS, experiment, layer, name_of
from tests.support.quick import QUICK


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

  group = exchange_group(
    cfg, mesh.abstract_mesh, tokens=48, top_k=2, num_experts=8, d_model=16, dtype=jnp.float32
  )
  name = exchanges(cfg)[0]
  id_bytes = (group.devices - 1) * group.tokens * group.top_k * 4 if name == 'gather' else 0
  for f, more, passes in ((forward, (), 1), (both, args[:1], 2)):
    with jax.set_mesh(mesh):
      text = jax.jit(f).lower(*args, *more).compile(QUICK).as_text()
    moved = sum(c.bytes for c in collectives(text, mesh.shape) if c.axes == ('expert',))
    assert moved == passes * exchange_bytes(group)[name] - id_bytes * (passes - 1)


@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_bytes_of_a_ragged_exchange_are_those_of_its_copies(top_k: int) -> None:
  """Four devices of two experts, counted copy by copy.

  All loads are even, or all tokens go to the first device.
  """
  devices, tokens, num_experts, row = 4, 8, 8, 16 * 2
  even = (np.arange(devices * tokens * top_k) % num_experts).reshape(devices, tokens, top_k)
  # Experts 0 and 1 are on the first device.
  worst = np.stack([np.arange(top_k)] * devices * tokens).reshape(even.shape)
  counts = (devices - 1) * num_experts * 4
  group = Group(devices, tokens, top_k, num_experts, d_model=16, itemsize=2, capacity=0)
  sizes = exchange_bytes(group)
  for name, ids in (('ragged', even), ('ragged_worst', worst)):
    device_of_copy = ids // 2
    # What the first device receives: copies of the others, and results of its own.
    copies, results = (device_of_copy[1:] == 0).sum(), (device_of_copy[0] != 0).sum()
    assert sizes[name] == copies * (row + 4) + results * row + counts, name
  assert 'all_to_all' not in sizes


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
  lacking = lacking_ragged(AbstractMesh((devices,), ('expert',), abstract_device=device))
  assert lacking == (f'{devices} x {kind}' if lacks else '')


def test_the_ragged_exchange_is_taken_where_it_moves_less() -> None:
  sparse, dense = DispatchConfig(), DispatchConfig('dense_matmul')
  full = DispatchConfig('dense_matmul', 1.0)
  group = Group(devices=4, tokens=64, top_k=2, num_experts=8, d_model=512, itemsize=2, capacity=20)
  # As many copies of a token as devices: a few bytes less than gather moves are not enough, since
  # there are buffers for twice as many.
  many = group._replace(top_k=4)
  assert [choose_exchange(sparse, g, '') for g in (group, many)] == ['ragged', 'gather']
  assert [choose_exchange(c, group, '') for c in (dense, full)] == ['gather', 'all_to_all']
  assert choose_exchange(sparse, group, '8 x cpu') == 'gather'
  assert choose_exchange(DispatchConfig(exchange='ragged'), many, '') == 'ragged'
  with pytest.raises(ConfigError) as error:
    choose_exchange(DispatchConfig(exchange='ragged'), group, '8 x cpu')
  assert str(error.value) == (
    "dispatch.exchange='ragged': no ragged_all_to_all on 8 x cpu: use 'auto' or 'gather'"
  )


def test_the_summary_says_what_the_step_does() -> None:
  mesh = make_mesh(FOUR).abstract_mesh
  cfg = experiment(DispatchConfig('dense_matmul', 1.5), FOUR)
  cfg = dataclasses.replace(cfg, batch_size=16, micro_batches=2)
  by, sizes = exchange_summary(cfg, mesh)
  group = Group(devices=4, tokens=6, top_k=2, num_experts=8, d_model=16, itemsize=4, capacity=3)
  assert by == 'all_to_all' and sizes == exchange_bytes(group)
  assert [*sizes] == ['gather', 'ragged', 'ragged_worst', 'all_to_all']
  assert exchange_summary(cfg, make_mesh(MeshConfig()).abstract_mesh) == ('', {})
  record = {'by': by, 'forward_bytes_per_device_and_layer': sizes}
  (line,) = exchange_lines({'mesh': FOUR.__dict__, 'exchange': record})
  assert line.startswith('experts over 4 devices, exchange by all_to_all;')
  assert line.endswith(f'all_to_all {human(sizes["all_to_all"], 1024)}B')
  nothing = {'by': '', 'forward_bytes_per_device_and_layer': {}}
  assert exchange_lines({'mesh': {'expert': 1}, 'exchange': nothing}) == []
