"""The least time of a step: links of a group of devices, bounds, and what remat adds."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from moejax.model.config import ModelConfig
from moejax.model.remat import REMAT_POLICIES
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.plan.hlo.collectives import Collective
from moejax.plan.memory_model import model_shapes
from moejax.plan.roofline import (
  Bound,
  group_links,
  least_time,
  mfu_ceiling,
  step_flops,
  time_bounds,
)
from moejax.plan.topology import Topology
from moejax.runtime.chips import CHIPS
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters, flops_per_token
from moejax.train.shapes import batch_shapes, make_run_mesh, sharded_state_shapes
from moejax.train.step.train_step import train_step
from tests.plan.eight_devices import CONFIG, CPU_8, changed, eight_chips
from tests.support.traced_flops import traced_flops


def test_links_of_a_group() -> None:
  """v5p: 90 GB/s a link, both ways round a ring. H200: NVLink in a node, else its network cards."""
  torus = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), -1)
  v5p, h200 = CHIPS['v5p'], CHIPS['h200']
  assert group_links(torus[:4], (4, 4, 4), v5p) == (('ICI z',), 180e9)
  assert group_links(torus[:2], (4, 4, 4), v5p) == (('ICI z',), 90e9), 'half of an axis is no ring'
  assert group_links(torus[:16], (4, 4, 4), v5p) == (('ICI y', 'ICI z'), 360e9)
  assert group_links(torus[:4], (4, 4, 4), CHIPS['v6e']._replace(torus=3)) == (('ICI z',), 90e9), (
    'closed at 16 only'
  )
  numbers = np.arange(64)[:, None]
  assert group_links(numbers[:8], (64,), h200) == (('NVLink',), 450e9)
  assert group_links(numbers, (64,), h200) == (('network',), 400e9)
  assert group_links(numbers[::8], (64,), h200) == (('network',), 50e9)


def test_the_slowest_bound_rules_and_what_shares_a_link_adds_up() -> None:
  found = [
    Bound('compute', 3.0, ('compute',)),
    Bound('fsdp', 2.0, ('x', 'y')),
    Bound('expert', 1.5, ('x',)),
  ]
  assert least_time(found) == (3.5, 'x') and least_time(found[:2]) == (3.0, 'compute')
  assert mfu_ceiling(2.0, 8 * 989e12, 8, CHIPS['h200']) == 0.5
  node = eight_chips('h200')._replace(sizes=(8,))
  spoken = [
    Collective('all-gather', ('fsdp',), 1, 450e9),
    Collective('all-reduce', ('fsdp',), 2, 450e9),
  ]
  told = time_bounds(989e12, 4.8e12, spoken, make_mesh(MeshConfig(1, 8)), node)
  assert [(bound.seconds, bound.uses) for bound in told] == [
    (1, ('compute',)),
    (1, ('memory',)),
    (2, ('NVLink',)),
  ]


def computed_again(cfg: ExperimentConfig, topology: Topology) -> float:
  flops = step_flops(cfg, count_parameters(model_shapes(cfg).model, cfg), topology)
  assert flops.model == cfg.batch_size * cfg.seq_len * flops_per_token(
    count_parameters(model_shapes(cfg).model, cfg), cfg
  )
  return flops.recomputing - flops.model


MANIFOLD = dataclasses.replace(
  CONFIG.model,
  num_layers=2,
  num_dense_layers=1,
  d_ff=384,
  mtp_depth=1,
  sandwich_norm=True,
  moe=dataclasses.replace(CONFIG.model.moe, num_shared=1),
)


@pytest.mark.parametrize('model', [dataclasses.replace(MANIFOLD, sandwich_norm=False), MANIFOLD])
def test_what_remat_computes_again_is_what_the_traced_step_does(model: ModelConfig) -> None:
  """By its products, which are counted but for norms: the plan takes their scales for matrices."""
  model = dataclasses.replace(
    model,
    attention=dataclasses.replace(model.attention, implementation='xla'),
    moe=dataclasses.replace(model.moe, dispatch=DispatchConfig(implementation='ragged_dot')),
  )
  # The traced core is the whole square, twice what the plan counts, and of the policy that keeps
  # its output, the first of its two products: each time half of the square more.
  layers, tokens = model.num_layers + model.mtp_depth, CONFIG.batch_size * CONFIG.seq_len
  half = 2 * tokens * CONFIG.seq_len * model.attention.output_width * layers
  traced = {}
  for remat in REMAT_POLICIES:
    cfg = dataclasses.replace(
      CONFIG, model=dataclasses.replace(model, remat=remat), mesh=MeshConfig(1)
    )
    mesh = make_run_mesh(cfg, jax.devices()[:1])
    with jax.set_mesh(mesh):
      step = jax.jit(functools.partial(train_step, cfg=cfg))
      program = step.trace(sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh))
    traced[remat] = traced_flops(program.jaxpr)
    expected = computed_again(cfg, CPU_8) + (half if remat != 'none' else 0)
    assert traced[remat] - traced['none'] == pytest.approx(expected, rel=0.01), remat


def test_windows_of_copies_are_computed_twice_in_any_case() -> None:
  tpu, gpu = eight_chips('v5p', 'tpu'), eight_chips('h200')
  one, group = changed('experts', fsdp=8), changed('experts', expert=8)
  assert computed_again(one, tpu) == computed_again(group, gpu) < computed_again(group, tpu)
  assert computed_again(changed('full', fsdp=8), tpu) == computed_again(group, tpu)


def test_every_chip_has_its_figures() -> None:
  for name, chip in CHIPS.items():
    assert chip.flops > 1e14 and chip.memory > 1e10 and chip.hbm > 5e11 and chip.link >= 4.5e10, (
      name
    )
    assert bool(chip.torus) != bool(chip.node) and bool(chip.node) == bool(chip.network), name
    assert math.isfinite(chip.memory / chip.hbm)
