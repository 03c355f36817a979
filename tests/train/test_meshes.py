"""Every mesh trains, gives the numbers of one device, and one that does not fit is told with the
nearest that does."""

import dataclasses
import itertools
import math
import types

import jax
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.model.config import AttentionConfig, LatentConfig
from moejax.sharding.divisibility import nearest
from moejax.sharding.logical_axes import RULES
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import devices_at_work
from moejax.train.shapes import divided_parts, make_run_mesh, state_shapes
from tests.support.emulated_exchange import emulate
from tests.support.mesh_cases import (
  ALONE,
  ALWAYS,
  DISPATCHES,
  FAST,
  MESHES,
  REFERENCE,
  Case,
  axes,
  batch,
  cases,
  config,
  covering_cases,
  features,
)
from tests.support.mesh_table import COLUMNS, measure, reference


def marked(case: Case) -> object:
  """A case as a parameter of a test; all but a few are slow. `make meshes` measures those that are
  not covering."""
  return case if case[:2] in FAST else pytest.param(case, marks=pytest.mark.slow)


def case_id(case: Case) -> str:
  return '-'.join(map(str, (*dataclasses.astuple(case.mesh), *case[1:])))


@pytest.mark.parametrize('case', [*map(marked, covering_cases())], ids=case_id)
def test_the_same_numbers_on_every_mesh_by_every_dispatcher(
  case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
  emulate(monkeypatch)
  found = measure(case)
  bad = {column: value for column, value in found.items() if not value <= COLUMNS[column]}
  assert found.keys() == COLUMNS.keys() and not bad, found


def test_nothing_is_left_out() -> None:
  assert len(MESHES) >= 12 and {*ALWAYS} <= {case[:2] for case in cases()}
  for name in DISPATCHES:
    mine = [case for case in cases() if case.dispatch == name]
    assert {case.micro_batches for case in mine} == {1, 2}, name
    assert {case.mtp_depth for case in mine} == {0, 1}, name


def test_the_cases_of_every_run_cover_all_that_there_are() -> None:
  """Every pair of axes, and every dispatcher with every axis, both numbers of micro-batches and
  depths. `make meshes` takes all."""
  chosen = covering_cases()
  assert {*chosen} <= {*cases()} and len(chosen) == len({*chosen}) <= 16
  assert {case[:2] for case in chosen} >= {*ALWAYS}
  for name in DISPATCHES:
    mine = [case for case in chosen if case.dispatch == name]
    assert {case.micro_batches for case in mine} == {1, 2}, name
    assert {case.mtp_depth for case in mine} == {0, 1}, name
    for axis in ('data', 'fsdp', 'expert', 'tensor'):
      assert any(axis in axes(case.mesh) for case in mine), (name, axis)
  for pair in itertools.combinations(('data', 'fsdp', 'expert', 'tensor'), 2):
    possible = any({*pair} <= {*axes(case.mesh)} for case in cases())
    assert possible == any({*pair} <= {*axes(case.mesh)} for case in chosen), pair
  assert set().union(*map(features, chosen)) == set().union(*map(features, cases()))


def test_the_batch_and_the_routers_are_as_uneven_as_they_are_meant_to_be() -> None:
  counts, (load, _) = batch().segment_ids.astype(bool).sum(1), reference(0).loads
  assert {*counts} >= {0, 5, 8} and not counts.reshape(8, -1).sum(1).all(), (
    'a device without any token'
  )
  assert not load[:, -1].any() and load.max() > 2 * load.mean(), load
  assert np.ptp(reference(0).loads, axis=0).any(), 'the second step routes in another way'


CFG = config(Case(ALONE, REFERENCE))
ALL = [
  MeshConfig(*sizes) for sizes in itertools.product(range(1, 9), repeat=4) if math.prod(sizes) <= 8
]


def asked(mesh: MeshConfig, **changes: object) -> ExperimentConfig:
  return dataclasses.replace(CFG, mesh=mesh, **changes)


def refused(cfg: ExperimentConfig) -> tuple[str, ...]:
  with pytest.raises(ConfigError) as error:
    make_run_mesh(cfg)
  return error.value.problems


def divides(cfg: ExperimentConfig, mesh: MeshConfig) -> bool:
  """By the shardings themselves, which cannot be made where sizes do not divide."""
  model = state_shapes(cfg).model
  try:
    for leaf, where in zip(
      jax.tree.leaves(model), jax.tree.leaves(shardings(model, make_mesh(mesh))), strict=True
    ):
      where.shard_shape(leaf.shape)
  except ValueError:
    return False
  rows = cfg.batch_size // cfg.micro_batches
  return rows % math.prod(getattr(mesh, axis) for axis in RULES['batch']) == 0


def typed(problem: str, mesh: MeshConfig) -> MeshConfig:
  """The mesh that the flags of an error make of one."""
  flags = [flag.split('=') for flag in problem.split(': ')[1].split()]
  return dataclasses.replace(
    mesh, **{name.removeprefix('--config.mesh.'): int(size) for name, size in flags}
  )


def test_a_mesh_is_refused_exactly_where_something_does_not_divide_and_the_nearest_trains() -> None:
  assert len(ALL) == 63
  cfg = dataclasses.replace(
    CFG,
    model=dataclasses.replace(
      CFG.model, mtp_depth=0, moe=dataclasses.replace(CFG.model.moe, d_expert=20)
    ),
  )  # a width of its own
  taken = [mesh for mesh in ALL if divides(cfg, mesh)]
  assert (
    MeshConfig(tensor=4, data=2) in taken
    and MeshConfig(1, tensor=8) not in taken
    and 30 < len(taken) < 60
  )
  for mesh in ALL:
    here = dataclasses.replace(cfg, mesh=mesh)
    if mesh in taken:
      assert make_run_mesh(here).size == math.prod(dataclasses.astuple(mesh))
    else:
      assert typed(refused(here)[-1], mesh) in taken, mesh


def test_all_that_does_not_divide_is_one_error() -> None:
  model = dataclasses.replace(CFG.model, vocab_size=33)
  *problems, remedy = refused(
    asked(MeshConfig(fsdp=5, expert=3, tensor=2), batch_size=32, model=model)
  )
  assert problems == [
    'mesh data=1 * fsdp=5 * expert=3 * tensor=2 = 30, but there are 8 devices: '
    'use sizes whose product is 8',
    'config.batch_size / micro_batches = 32 rows do not divide over '
    'data * fsdp * expert = 15 devices: 45 would',
    'the 24 embed channels of model.blocks.attention.k.w [1, 24, 8] do not divide over '
    'mesh.fsdp=5: 25 would',
    'config.model.moe.router.num_experts=8 experts do not divide over mesh.expert=3: 9 would',
    'config.model.vocab_size=33 tokens do not divide over mesh.tensor=2: 34 would',
    'the 48 embed channels of model.mtp.projection.w [1, 48, 24] do not divide over '
    'mesh.fsdp=5: 50 would',
  ]
  assert remedy == (
    'the nearest mesh that would do, of 8 devices out of 8: '
    '--config.mesh.fsdp=4 --config.mesh.expert=2 --config.mesh.tensor=1'
  )


def test_rows_are_those_of_a_micro_batch_heads_are_whole_and_ranks_divide() -> None:
  found, _ = refused(asked(MeshConfig(), micro_batches=4))
  assert (
    'micro_batches = 12 rows do not divide over data * fsdp * expert = 8 devices: 16 would' in found
  )
  few = dataclasses.replace(
    CFG.model, attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=8)
  )
  found, _ = refused(asked(MeshConfig(tensor=4), model=few))
  assert (
    found == 'config.model.attention.num_heads=2 heads do not divide over mesh.tensor=4: 4 would'
  )
  assert make_run_mesh(asked(MeshConfig(tensor=2), model=few)).shape['tensor'] == 2, (
    'of key-value heads there may be fewer'
  )
  latent = dataclasses.replace(
    CFG.model, attention=AttentionConfig(8, 8, 2, latent=LatentConfig(6, 8, 2, 2))
  )
  found, _ = refused(asked(MeshConfig(fsdp=4), model=latent))
  assert found == (
    'the 6 embed channels of model.blocks.attention.kv_b.w [1, 6, 32] do not divide over '
    'mesh.fsdp=4: 8 would'
  )


@pytest.mark.parametrize(
  ('mesh', 'flags'),
  [
    (MeshConfig(fsdp=3), '--config.mesh.fsdp=4'),
    (MeshConfig(tensor=16), '--config.mesh.tensor=8'),
    (MeshConfig(7), '--config.mesh.data=8'),
    (MeshConfig(2, expert=8), '--config.mesh.data=1'),
    (MeshConfig(1, expert=3), '--config.mesh.data=3 --config.mesh.expert=1'),
  ],
  ids=str,
)
def test_the_nearest_changes_least(mesh: MeshConfig, flags: str) -> None:
  assert refused(asked(mesh))[-1].split(': ')[1] == flags


def test_a_batch_that_no_mesh_of_all_devices_divides_leaves_some_idle(
  caplog: pytest.LogCaptureFixture,
) -> None:
  model = dataclasses.replace(CFG.model, vocab_size=257)
  cfg = asked(MeshConfig(), batch_size=12, model=model)
  *_, remedy = refused(cfg)
  assert remedy == 'the nearest mesh that would do, of 6 devices out of 8: --config.mesh.data=6'
  with caplog.at_level('INFO'):
    mesh = make_run_mesh(dataclasses.replace(cfg, mesh=typed(remedy, cfg.mesh)))
  assert mesh.size == 6 and 'mesh of 6 devices: the other 2 stay idle' in caplog.text
  assert devices_at_work() == jax.devices()
  with jax.set_mesh(mesh):
    assert devices_at_work() == jax.devices()[:6], 'utilisation is of those that work'


def test_processes_all_take_part() -> None:
  """Where there is no mesh of all devices, there is none."""
  parts, apart = (
    divided_parts(asked(MeshConfig())),
    [types.SimpleNamespace(process_index=i // 4) for i in range(8)],
  )
  assert nearest(MeshConfig(3, expert=2), parts, apart).endswith('--config.mesh.data=4')
  rows = [part._replace(number=7) for part in parts]
  assert (
    nearest(MeshConfig(), rows, apart) == 'no mesh of 8 devices would do: mend the numbers above'
  )
  assert nearest(MeshConfig(), rows, apart[:4]).endswith(
    'of 1 device out of 4: --config.mesh.data=1'
  )
