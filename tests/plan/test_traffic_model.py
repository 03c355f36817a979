"""The estimate of what a step sends and moves: sums done by hand, and what more work adds."""

import dataclasses

import pytest

from moejax.plan.memory_model import model_shapes, tokens_per_device
from moejax.plan.traffic_model import estimated_collectives, memory_traffic
from moejax.sharding.mesh import MeshConfig
from tests.plan.eight_devices import CONFIG, changed, eight_chips


def test_collectives_go_over_the_axes_that_the_mesh_has() -> None:
  shapes, h200 = model_shapes(CONFIG), eight_chips('h200')
  assert estimated_collectives(changed(data=1), shapes, h200) == []
  found = estimated_collectives(changed(data=1, fsdp=2, expert=2, tensor=2), shapes, h200)
  assert [each.axes for each in found] == [('fsdp',), ('expert',), ('tensor',)]
  [over_data] = estimated_collectives(changed(data=8), shapes, h200)
  gradients = 4 * shapes.count(changed(data=8).mesh)
  assert over_data.bytes == pytest.approx(2 * gradients * 7 / 8), 'an all-reduce in a ring'


def test_two_sums_a_layer_go_over_tensor() -> None:
  cfg = changed('none', data=4, tensor=2)
  over_data, over_tensor = estimated_collectives(cfg, model_shapes(CONFIG), eight_chips('h200'))
  assert (over_data.axes, over_tensor.axes) == (('data',), ('tensor',))
  activations = tokens_per_device(cfg, cfg.mesh) * cfg.model.d_model * 4
  sums = 2 * cfg.model.num_layers * 2  # forward and backward
  assert over_tensor.bytes == pytest.approx(2 * activations / 2 * sums)


def test_only_layers_with_experts_exchange_tokens() -> None:
  over_expert = []
  for pattern in (('moe',), ('moe', 'dense')):
    model = dataclasses.replace(CONFIG.model, ffn_pattern=pattern)
    cfg = dataclasses.replace(CONFIG, model=model, mesh=MeshConfig(1, expert=8))
    found = estimated_collectives(cfg, model_shapes(cfg), eight_chips('h200'))
    over_expert += [each.bytes for each in found if each.axes == ('expert',)]
  every, second = over_expert
  assert every == pytest.approx(2 * second)


def test_what_is_kept_and_micro_batches_move_more_through_memory() -> None:
  """As in compiled programs, docs/speed.md: what is kept is written and read, a stack at a time."""
  shapes, h200 = model_shapes(CONFIG), eight_chips('h200')
  all_kept, remat, parts = (
    memory_traffic(cfg, shapes, h200)
    for cfg in (changed('none', data=8), changed('full', data=8), changed('none', 4, data=8))
  )
  assert 0 < remat < all_kept < parts
