"""Training steps on many meshes, by every dispatcher, against those on one device: `make meshes` prints the table.

  mesh, dispatcher -> two steps on virtual devices -> worst deviation of objective, gradient, load, bias, next routing

Routers choose unevenly and one expert gets no token; rows are ragged, some of them all padding; losses over documents,
groups and the whole batch are on. The reference is dense_matmul on one device, in one micro-batch.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
import rich.table
from jax.sharding import NamedSharding
from rich.console import Console

from moejax.certify.report import rewrite
from moejax.certify.tiny_model import packed
from moejax.config import frozendict
from moejax.data.batch import Batch
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig
from moejax.train.shapes import make_run_mesh, state_shapes
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import Metrics, eval_step, train_step
from tests.support.emulated_exchange import emulate
from tests.support.quick import QUICK

ROWS, LENGTH, VOCAB, EXPERTS, TOP_K = 48, 8, 32, 8, 2
EVERYTHING = (
  EXPERTS / TOP_K
)  # a capacity factor at which a token's own place in a buffer is always free

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
  MeshConfig(1, fsdp=3, expert=2),
)  # of the last, two devices stay idle
DISPATCHES = {
  'dense_matmul': DispatchConfig('dense_matmul', exchange='gather'),
  'dense_matmul with capacity': DispatchConfig('dense_matmul', EVERYTHING, exchange='all_to_all'),
  'sparse_matmul': DispatchConfig('sparse_matmul', exchange='gather'),
  'sparse_matmul, ragged': DispatchConfig('sparse_matmul', exchange='ragged'),
}


class Case(NamedTuple):
  """One way to take the steps."""

  mesh: MeshConfig
  dispatch: str  # a row of DISPATCHES
  micro_batches: int = 1
  mtp_depth: int = 1


def cases() -> list[Case]:
  """Every mesh with every dispatcher, but what cannot differ: the reference, and exchanges without anybody else.

  Two micro-batches and multi-token prediction go round, so that each dispatcher, on meshes of each kind, meets them.
  """
  found = []
  for (i, mesh), (j, (name, dispatch)) in itertools.product(
    enumerate((ALONE, *MESHES)), enumerate(DISPATCHES.items())
  ):
    if mesh.expert > 1 or dispatch.exchange != 'ragged' and (mesh, name) != (ALONE, REFERENCE):
      found.append(Case(mesh, name, 1 + ((i + j) % 4 == 2), int((i + j) % 4 == 0)))
  return found


def config(case: Case) -> ExperimentConfig:
  """The smallest model that has every part."""
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
      moe=MoEConfig(
        RouterConfig(EXPERTS, TOP_K, 'sigmoid'), DISPATCHES[case.dispatch], d_expert=8, num_shared=1
      ),
    ),
    balance=BalanceConfig(
      frozendict(
        sequence=0.1, ep_group=0.1, global_batch=0.1, router_z=0.01, simbal=0.01, importance=0.1
      ),
      'sign',
      '0.05',
      ep_groups=4,
    ),
    # A large eps makes the update smooth in the gradient: at 1e-8 it would be the sign of the rounding of a zero.
    optim=OptimConfig(learning_rate=0.05, warmup_steps=0, eps=1e-2, clip_norm=0.0),
  )


@functools.cache
def batch() -> Batch:
  """Documents of uneven lengths, ragged rows, and so many of padding alone that one of eight devices has no token."""
  rng = np.random.default_rng(0)
  text = rng.integers(1, VOCAB, (ROWS, LENGTH + 1))
  segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.2, 1) + 1
  segments[np.arange(LENGTH) >= rng.integers(LENGTH // 2, 2 * LENGTH, (ROWS, 1))] = 0
  segments[[5, 40]] = 0
  segments[ROWS // 4 : ROWS // 4 + ROWS // 8] = 0
  return packed(text, segments)


@functools.cache
def numbers(mtp_depth: int) -> list[np.ndarray]:
  """Of a fresh state, in the order of its leaves: any dispatcher's."""
  cfg = config(Case(ALONE, REFERENCE, 1, mtp_depth))
  return jax.tree.leaves(jax.device_get(jax.jit(lambda: init_state(cfg), compiler_options=QUICK)()))


def start(cfg: ExperimentConfig) -> TrainState:
  """A state whose routers prefer some experts by far, and whose bias keeps everybody from the last one. NumPy."""
  fresh = [number.copy() for number in numbers(cfg.model.mtp_depth)]
  state = jax.tree.unflatten(jax.tree.structure(state_shapes(cfg)), fresh)
  model, bias = state.model, state.router.bias
  for block in (model.blocks, *([model.mtp.block] if cfg.model.mtp_depth else [])):
    block.moe.router[...] = 20 * block.moe.router[...]
  bias[:] = [0.4, 0.2, 0.1, 0, 0, 0, 0, -10]
  return state


class Taken(NamedTuple):
  """What two steps did, in NumPy."""

  terms: list[dict[str, float]]  # of the objective, and itself, in each step
  gradient: dict[str, np.ndarray]  # path -> of the first step
  loads: np.ndarray  # [2, L, E]
  bias: np.ndarray  # [L, E] after the first
  expert_ids: np.ndarray  # [L, B, S, K] then
  apart: int  # devices whose bias has not the first's bits


@functools.cache
def chooser(mtp_depth: int) -> object:
  """Who is chosen in a state, by one program for all."""
  cfg = config(Case(ALONE, REFERENCE, 1, mtp_depth))
  return jax.jit(
    lambda model, router, rows: eval_step(model, router, rows, cfg)['expert_ids'],
    compiler_options=QUICK,
  )


def take(case: Case) -> Taken:
  """Two steps."""
  cfg = config(case)
  mesh, plain = make_run_mesh(cfg), config(Case(ALONE, REFERENCE, 1, case.mtp_depth))
  step = jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK)

  def one(state: TrainState) -> tuple[TrainState, Metrics]:
    # Two programs of eight virtual devices at once, and each may hold the threads that the other waits for.
    return jax.block_until_ready(step(state, rows))

  with jax.set_mesh(mesh):
    places = shardings(state_shapes(cfg), mesh), NamedSharding(mesh, spec('batch'))
    state, rows = jax.block_until_ready(jax.device_put((start(cfg), batch()), places))
    after, first = one(state)
    metrics = jax.device_get([first, one(after)[1]])
  bias = after.router.bias
  assert bias.sharding.is_fully_replicated
  bits = [np.asarray(shard.data).tobytes() for shard in bias.addressable_shards]
  moments = optax.tree.get_all_with_path(after.opt_state, 'mu')[0][1]
  gradient = {
    jax.tree_util.keystr(path): np.asarray(leaf) / (1 - cfg.optim.beta1)
    for path, leaf in jax.tree.leaves_with_path(moments)
  }
  model = jax.tree.unflatten(
    jax.tree.structure(state_shapes(plain).model), jax.tree.leaves(jax.device_get(after.model))
  )
  ids = chooser(case.mtp_depth)(model, jax.device_get(after.router), batch())
  terms = [
    {
      name: float(value)
      for name, value in found.items()
      if name in ('loss', 'lm_loss', 'z_loss', 'mtp_loss') or name.startswith('balance/')
    }
    for found in metrics
  ]
  return Taken(
    terms,
    gradient,
    np.stack([found['load'] for found in metrics]),
    np.asarray(bias),
    np.asarray(ids),
    sum(one != bits[0] for one in bits),
  )


@functools.cache
def reference(mtp_depth: int) -> Taken:
  """On one device, in one micro-batch."""
  return take(Case(ALONE, REFERENCE, 1, mtp_depth))


# what is measured -> how much of it is allowed: sums of float32 in another order, or nothing
COLUMNS = {'loss': 1e-6, 'gradient': 2e-6, 'load': 0.0, 'bias': 0.0, 'apart': 0.0, 'routing': 0.0}


def measure(case: Case) -> dict[str, float]:
  """Worst deviation of a case: of the objective and its terms, relative; of each parameter's gradient, of its largest
  entry; of the load, in copies; of the bias; devices whose bias is another; copies that go elsewhere afterwards."""
  one, other = reference(case.mtp_depth), take(case)
  assert (
    one.gradient.keys() == other.gradient.keys() and one.terms[0].keys() == other.terms[0].keys()
  )
  return {
    'loss': max(
      abs(there[name] / value - 1)
      for here, there in zip(one.terms, other.terms)
      for name, value in here.items()
    ),
    'gradient': max(
      float(np.abs(other.gradient[path] - value).max() / np.abs(value).max())
      for path, value in one.gradient.items()
    ),
    'load': float(np.abs(other.loads - one.loads).max()),
    'bias': float(np.abs(other.bias - one.bias).max()),
    'apart': float(other.apart),
    'routing': float((other.expert_ids != one.expert_ids).sum()),
  }


def written(value: float) -> str:
  """A cell of the table."""
  return f'{value:.1e}'.replace('e-0', 'e-') if value % 1 else f'{value:.0f}'


def named(mesh: MeshConfig) -> str:
  """Its axes that are more than one device."""
  return (
    ' x '.join(f'{axis} {n}' for axis, n in dataclasses.asdict(mesh).items() if n > 1)
    or 'one device'
  )


def readme_rows(rows: dict[Case, dict[str, float]]) -> str:
  """The table for README: a row for each mesh, objective and gradient by dispatcher, and the worst of the rest."""
  exact = [column for column, allowed in COLUMNS.items() if not allowed]
  cells = [['mesh', *DISPATCHES, 'load, bias, routing'], ['---'] * (2 + len(DISPATCHES))]
  for mesh in dict.fromkeys(case.mesh for case in rows):
    own = {case.dispatch: found for case, found in rows.items() if case.mesh == mesh}
    each = [
      f'{written(own[name]["loss"])}, {written(own[name]["gradient"])}' if name in own else '-'
      for name in DISPATCHES
    ]
    cells.append(
      [
        named(mesh),
        *each,
        written(max(found[column] for found in own.values() for column in exact)),
      ]
    )
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def main() -> None:
  """Prints the table; exits with 1 where something is beyond its bounds."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--readme', default='', metavar='FILE', help='rewrite the table between its two comments'
  )
  args, rows = parser.parse_args(), {}
  table = rich.table.Table('mesh', 'dispatcher', 'micro-batches', 'depths', *COLUMNS)
  with pytest.MonkeyPatch.context() as patch:
    emulate(patch)
    for case in cases():
      print(named(case.mesh), *case[1:], sep=', ', file=sys.stderr)
      rows[case] = measure(case)
      table.add_row(named(case.mesh), *map(str, case[1:]), *map(written, rows[case].values()))
  table.add_row('allowed', '', '', '', *map(written, COLUMNS.values()))
  Console(width=140).print(table)
  if args.readme:
    rewrite(Path(args.readme), 'meshes', readme_rows(rows))
  raise SystemExit(
    any(not value <= COLUMNS[column] for found in rows.values() for column, value in found.items())
  )


if __name__ == '__main__':
  main()
