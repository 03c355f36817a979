"""Training steps on many meshes, by every dispatcher, against those on one device: `make meshes`
prints the table.

  mesh, dispatcher -> two steps on virtual devices -> worst deviation of objective, gradient, load,
  bias, next routing

The reference is dense_matmul on one device, in one micro-batch.
"""

import argparse
import functools
import sys
from collections.abc import Callable
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
from moejax.data.batch import Batch
from moejax.model.transformer import Transformer
from moejax.moe.bias import BiasState
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import make_run_mesh, state_shapes
from moejax.train.step.train_state import TrainState, init_state
from moejax.train.step.train_step import Metrics, eval_step, train_step
from tests.support.emulated_exchange import emulate
from tests.support.mesh_cases import (
  ALONE,
  DISPATCHES,
  REFERENCE,
  Case,
  axes,
  batch,
  cases,
  config,
)
from tests.support.quick import QUICK

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'scaling.md'  # where the table is printed


@functools.cache
def initial_leaves(mtp_depth: int) -> list[np.ndarray]:
  """The leaves of a fresh state, in their order, which is the same for every dispatcher. NumPy."""
  cfg = config(Case(ALONE, REFERENCE, 1, mtp_depth))
  state = jax.jit(lambda: init_state(cfg), compiler_options=QUICK)()
  return jax.tree.leaves(jax.device_get(state))


def start(cfg: ExperimentConfig) -> TrainState:
  """A state whose routers prefer some experts by far, and whose bias keeps every token from the
  last one. NumPy."""
  fresh = [leaf.copy() for leaf in initial_leaves(cfg.model.mtp_depth)]
  state = jax.tree.unflatten(jax.tree.structure(state_shapes(cfg)), fresh)
  model, bias = state.model, state.router.bias
  blocks = [model.blocks, model.mtp.block] if cfg.model.mtp_depth else [model.blocks]
  for block in blocks:
    block.moe.router[...] = 20 * block.moe.router[...]
  bias[:] = [0.4, 0.2, 0.1, 0, 0, 0, 0, -10]
  return state


class Taken(NamedTuple):
  """What two steps did, in NumPy."""

  terms: list[dict[str, float]]  # of the objective, and itself, in each step
  gradient: dict[str, np.ndarray]  # path -> gradient of the first step
  loads: np.ndarray  # [2, L, E]
  bias: np.ndarray  # [L, E] after the first
  expert_ids: np.ndarray  # [L, B, S, K] chosen with the state after the first
  apart: int  # devices whose bias has not the first device's bits


@functools.cache
def choose_experts(mtp_depth: int) -> Callable[[Transformer, BiasState, Batch], jax.Array]:
  """A program that gives the expert ids [L, B, S, K] of a state: one for all meshes and
  dispatchers."""
  cfg = config(Case(ALONE, REFERENCE, 1, mtp_depth))
  return jax.jit(
    lambda model, router, rows: eval_step(model, router, rows, cfg)['expert_ids'],
    compiler_options=QUICK,
  )


def objective_terms(metrics: Metrics) -> dict[str, float]:
  """The objective and its terms in the metrics of a step."""
  losses = ('loss', 'lm_loss', 'z_loss', 'mtp_loss')
  return {
    name: float(value)
    for name, value in metrics.items()
    if name in losses or name.startswith('balance/')
  }


def first_gradient(state: TrainState, beta1: float) -> dict[str, np.ndarray]:
  """path -> gradient of the first step, from Adam's first moment after it: (1 - beta1) g."""
  moments = optax.tree.get_all_with_path(state.opt_state, 'mu')[0][1]
  return {
    jax.tree_util.keystr(path): np.asarray(leaf) / (1 - beta1)
    for path, leaf in jax.tree.leaves_with_path(moments)
  }


def take(case: Case) -> Taken:
  """Takes two steps on the mesh of the case."""
  cfg = config(case)
  mesh = make_run_mesh(cfg)
  step = jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK)

  def one(state: TrainState) -> tuple[TrainState, Metrics]:
    # Two programs of eight virtual devices at once, and each may hold the threads that the other
    # waits for.
    return jax.block_until_ready(step(state, rows))

  with jax.set_mesh(mesh):
    places = shardings(state_shapes(cfg), mesh), NamedSharding(mesh, spec('batch'))
    state, rows = jax.block_until_ready(jax.device_put((start(cfg), batch()), places))
    after, first = one(state)
    metrics = jax.device_get([first, one(after)[1]])
  bias = after.router.bias
  assert bias.sharding.is_fully_replicated
  bits = [np.asarray(shard.data).tobytes() for shard in bias.addressable_shards]
  # The same leaves in the structure of the reference, whose one program then chooses for every
  # case.
  plain = state_shapes(config(Case(ALONE, REFERENCE, 1, case.mtp_depth)))
  leaves = jax.tree.leaves(jax.device_get(after.model))
  model = jax.tree.unflatten(jax.tree.structure(plain.model), leaves)
  ids = choose_experts(case.mtp_depth)(model, jax.device_get(after.router), batch())
  return Taken(
    terms=[objective_terms(found) for found in metrics],
    gradient=first_gradient(after, cfg.optim.beta1),
    loads=np.stack([found['load'] for found in metrics]),
    bias=np.asarray(bias),
    expert_ids=np.asarray(ids),
    apart=sum(own != bits[0] for own in bits),
  )


@functools.cache
def reference(mtp_depth: int) -> Taken:
  """The two steps on one device, in one micro-batch."""
  return take(Case(ALONE, REFERENCE, 1, mtp_depth))


# what is measured -> how much of it is allowed: sums of float32 in another order, or nothing
COLUMNS = {'loss': 1e-6, 'gradient': 2e-6, 'load': 0.0, 'bias': 0.0, 'apart': 0.0, 'routing': 0.0}


def measure(case: Case) -> dict[str, float]:
  """The worst deviations of a case: of the objective and its terms, relative; of each parameter's
  gradient, relative to its largest entry; of the load, in copies; of the bias; devices whose bias
  is another; copies that go elsewhere afterwards."""
  one, other = reference(case.mtp_depth), take(case)
  assert one.gradient.keys() == other.gradient.keys()
  assert one.terms[0].keys() == other.terms[0].keys()
  losses = [
    abs(theirs[name] / value - 1)
    for ours, theirs in zip(one.terms, other.terms)
    for name, value in ours.items()
  ]
  gradients = [
    float(np.abs(other.gradient[path] - value).max() / np.abs(value).max())
    for path, value in one.gradient.items()
  ]
  return {
    'loss': max(losses),
    'gradient': max(gradients),
    'load': float(np.abs(other.loads - one.loads).max()),
    'bias': float(np.abs(other.bias - one.bias).max()),
    'apart': float(other.apart),
    'routing': float((other.expert_ids != one.expert_ids).sum()),
  }


def written(value: float) -> str:
  """A cell of the table: a whole number, or a power of ten with two digits."""
  return f'{value:.1e}'.replace('e-0', 'e-') if value % 1 else f'{value:.0f}'


def named(mesh: MeshConfig) -> str:
  """The axes of a mesh that are more than one device, for a person."""
  return ' x '.join(f'{axis} {getattr(mesh, axis)}' for axis in axes(mesh)) or 'one device'


def markdown_rows(rows: dict[Case, dict[str, float]]) -> str:
  """The table in Markdown: a row for each mesh, objective and gradient by dispatcher, and the worst
  of the rest."""
  exact = [column for column, allowed in COLUMNS.items() if not allowed]
  cells = [['mesh', *DISPATCHES, 'load, bias, routing'], ['---'] * (2 + len(DISPATCHES))]
  for mesh in dict.fromkeys(case.mesh for case in rows):
    own = {case.dispatch: found for case, found in rows.items() if case.mesh == mesh}
    row = [named(mesh)]
    for name in DISPATCHES:
      measured = name in own
      row.append(
        f'{written(own[name]["loss"])}, {written(own[name]["gradient"])}' if measured else '-'
      )
    row.append(written(max(found[column] for found in own.values() for column in exact)))
    cells.append(row)
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def main() -> None:
  """Prints the table; exits with 1 where something is beyond its bounds."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--readme',
    default='',
    nargs='?',
    const=str(DOCUMENT),
    metavar='FILE',
    help='rewrite the table between its two comments in a file, docs/scaling.md if none is named',
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
    rewrite(Path(args.readme), 'meshes', markdown_rows(rows))
  beyond = [
    (case, column)
    for case, found in rows.items()
    for column, value in found.items()
    if not value <= COLUMNS[column]
  ]
  raise SystemExit(bool(beyond))


if __name__ == '__main__':
  main()
