"""The least time of a step: links of a group of devices, bounds, and what remat adds."""

import math

import numpy as np
import pytest

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
from moejax.runtime.chips import CHIPS
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.cost import count_parameters, flops_per_token
from tests.plan.eight_devices import CONFIG, changed, eight_chips


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


def test_remat_runs_the_blocks_again() -> None:
  parameters = count_parameters(model_shapes(CONFIG).model, CONFIG)
  tokens, useful = CONFIG.batch_size * CONFIG.seq_len, flops_per_token(parameters, CONFIG)
  assert step_flops(changed('none'), parameters) == (tokens * useful, tokens * useful)
  blocks = useful - 6 * parameters.embedding
  assert step_flops(changed('full'), parameters)[1] == pytest.approx(tokens * (useful + blocks / 3))
  assert (
    tokens * useful
    < step_flops(changed('dots'), parameters)[1]
    < step_flops(changed('full'), parameters)[1]
  )


def test_every_chip_has_its_figures() -> None:
  for name, chip in CHIPS.items():
    assert chip.flops > 1e14 and chip.memory > 1e10 and chip.hbm > 5e11 and chip.link >= 4.5e10, (
      name
    )
    assert bool(chip.torus) != bool(chip.node) and bool(chip.node) == bool(chip.network), name
    assert math.isfinite(chip.memory / chip.hbm)
