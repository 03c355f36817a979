"""The meshes, dispatchers and batch of the table of meshes, and which of its cases every test run
takes.

  mesh, dispatcher, micro-batches, depths -> the config of the smallest model that has every part

Routers choose unevenly and one expert gets no token; rows are ragged, some of them all padding;
losses over documents, groups and the whole batch are on.
"""

import dataclasses
import functools
import itertools
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from moejax.certify.tiny_model import packed
from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig

ROWS, LENGTH, VOCAB, EXPERTS, TOP_K = 48, 8, 32, 8, 2
# With this capacity factor every expert has a place for every token, so that nothing is dropped.
EVERYTHING = EXPERTS / TOP_K

ALONE, REFERENCE = MeshConfig(1), 'dense_matmul'
MESHES = (
  MeshConfig(8),
  MeshConfig(1, fsdp=8),
  MeshConfig(1, expert=8),
  MeshConfig(1, tensor=8),
  MeshConfig(4, fsdp=2),
  MeshConfig(2, expert=4),
  MeshConfig(1, fsdp=2, expert=4),
  MeshConfig(1, fsdp=4, tensor=2),
  MeshConfig(1, expert=2, tensor=4),
  MeshConfig(2, fsdp=2, expert=2),
  MeshConfig(2, expert=2, tensor=2),
  MeshConfig(1, fsdp=2, expert=2, tensor=2),
  MeshConfig(1, fsdp=3, expert=2),  # two of eight devices stay idle
)
DISPATCHES = {
  'dense_matmul': DispatchConfig('dense_matmul', exchange='gather'),
  'dense_matmul with capacity': DispatchConfig('dense_matmul', EVERYTHING, exchange='all_to_all'),
  'sparse_matmul': DispatchConfig('sparse_matmul', exchange='gather'),
  'sparse_matmul, ragged': DispatchConfig('sparse_matmul', exchange='ragged'),
}
# In every run of the suite: each axis and each way to exchange once.
ALWAYS = (
  (MeshConfig(1, fsdp=2, expert=2, tensor=2), 'sparse_matmul'),
  (MeshConfig(2, expert=4), 'sparse_matmul, ragged'),
  (MeshConfig(1, fsdp=3, expert=2), 'dense_matmul with capacity'),
)
# With the fast tests: compiling is all the time.
FAST = ALWAYS[:1]


class Case(NamedTuple):
  """One way to take the steps."""

  mesh: MeshConfig
  dispatch: str  # a row of DISPATCHES
  micro_batches: int = 1
  mtp_depth: int = 1


def cases() -> list[Case]:
  """Every mesh with every dispatcher, except the reference itself and ragged exchanges without a
  second device.

  Two micro-batches and multi-token prediction take turns, so that every dispatcher meets both of
  them.
  """
  chosen = []
  for i, mesh in enumerate((ALONE, *MESHES)):
    for j, (name, dispatch) in enumerate(DISPATCHES.items()):
      exchanges = mesh.expert > 1 or dispatch.exchange != 'ragged'
      if exchanges and (mesh, name) != (ALONE, REFERENCE):
        turn = (i + j) % 4
        chosen.append(Case(mesh, name, 1 + (turn == 2), int(turn == 0)))
  return chosen


def axes(mesh: MeshConfig) -> tuple[str, ...]:
  """The names of the axes that are more than one device."""
  return tuple(name for name, size in dataclasses.asdict(mesh).items() if size > 1)


def features(case: Case) -> frozenset[Hashable]:
  """What a case covers: each pair of axes; its dispatcher with each axis, its number of
  micro-batches and its depth."""
  parts = axes(case.mesh)
  numbers = (('micro_batches', case.micro_batches), ('mtp_depth', case.mtp_depth))
  by_dispatch = itertools.product([case.dispatch], (*parts, *numbers))
  return frozenset([*itertools.combinations(parts, 2), *by_dispatch])


@functools.cache
def covering_cases() -> tuple[Case, ...]:
  """The cases that every test run takes, in the order of `cases`: together they have every feature
  of all.

  Greedy after those of ALWAYS: each time the case with the most features that none before it had.
  """
  chosen = [case for case in cases() if case[:2] in ALWAYS]
  left = [case for case in cases() if case not in chosen]
  covered = set().union(*map(features, chosen))
  everything = set().union(*map(features, cases()))
  while covered != everything:
    best = max(left, key=lambda case: len(features(case) - covered))
    left.remove(best)
    chosen.append(best)
    covered |= features(best)
  return tuple(case for case in cases() if case in chosen)


def config(case: Case) -> ExperimentConfig:
  """The smallest model that has every part."""
  router = RouterConfig(EXPERTS, TOP_K, 'sigmoid')
  return ExperimentConfig(
    steps=100,
    batch_size=ROWS,
    seq_len=LENGTH,
    micro_batches=case.micro_batches,
    mesh=case.mesh,
    loss=LossConfig(z_coef='1e-3', mtp_coef='0.3', chunks=1),
    model=ModelConfig(
      vocab_size=VOCAB,
      d_model=24,
      num_layers=1,
      mtp_depth=case.mtp_depth,
      attention=AttentionConfig(num_heads=8, num_kv_heads=4, d_head=2),
      moe=MoEConfig(router, DISPATCHES[case.dispatch], d_expert=8, num_shared=1),
    ),
    balance=BalanceConfig(
      frozendict(
        sequence=0.1, ep_group=0.1, global_batch=0.1, router_z=0.01, simbal=0.01, importance=0.1
      ),
      'sign',
      '0.05',
      ep_groups=4,
    ),
    # A large eps makes the update smooth in the gradient: at 1e-8 it would be the sign of the
    # rounding of a zero.
    optim=OptimConfig(learning_rate=0.05, warmup_steps=0, eps=1e-2, clip_norm=0.0),
  )


@functools.cache
def batch() -> Batch:
  """Documents of uneven lengths in ragged rows; so many rows are padding alone that one of eight
  devices has no token."""
  rng = np.random.default_rng(0)
  text = rng.integers(1, VOCAB, (ROWS, LENGTH + 1))
  segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.2, 1) + 1
  segments[np.arange(LENGTH) >= rng.integers(LENGTH // 2, 2 * LENGTH, (ROWS, 1))] = 0
  segments[[5, 40]] = 0
  segments[ROWS // 4 : ROWS // 4 + ROWS // 8] = 0
  return packed(text, segments)
