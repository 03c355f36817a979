"""Exchanges over the `expert` axis: what moves, and that expert weights stay where they are."""

import functools
import re
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from jax import Array
from jax.sharding import PartitionSpec as P

from moejax.config import ConfigError
from moejax.moe.dispatch import dispatchers
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.dispatch.exchange import expert_specs, send_rows
from moejax.moe.experts.weights import Weights
from moejax.plan.hlo.collectives import walk
from moejax.plan.hlo.program import array_bytes, parse_program
from moejax.plan.hlo.replica_groups import axes_of, groups_of
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.shapes import batch_shapes, sharded_state_shapes
from moejax.train.step.train_step import train_step
from tests.moe.dispatch.exchange_cases import (
  FOUR,
  MIXED,
  PRIME,
  WAYS,
  experiment,
  layer,
  name_of,
)
from tests.support.emulated_exchange import emulate
from tests.support.quick import QUICK


def compiled_step(cfg: ExperimentConfig) -> str:
  mesh = make_mesh(cfg.mesh)
  with jax.set_mesh(mesh):
    step = jax.jit(functools.partial(train_step, cfg=cfg))
    lowered = step.lower(sharded_state_shapes(cfg, mesh), batch_shapes(cfg, mesh))
    return lowered.compile(QUICK).as_text()


def axes_of_expert_weights(text: str, mesh: Mapping[str, int]) -> set[tuple[str, str]]:
  """(kind, axis) of every collective whose result is as large as a part of experts' matrices.

  Not their biases: these lie whole over `tensor`, and are brought together after an update.
  """
  part = 16 * PRIME * 4  # bytes of half of a matrix of one expert
  computations, entry = parse_program(text)
  seen: set[tuple[str, str]] = set()
  for _, instruction, _ in walk(computations, entry):
    for axis in axes_of(groups_of(instruction.rest, 8), mesh):
      if any(size and size % part == 0 for size in array_bytes(instruction.shape)):
        seen.add((instruction.op, axis))
  return seen


@pytest.mark.slow
@pytest.mark.parametrize('cfg', WAYS, ids=name_of)
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
  def whole_specs(experts: Weights) -> Weights:
    # Experts over fsdp alone, if at all.
    first = {'expert': None, ('expert', 'fsdp'): 'fsdp'}
    return jax.tree.map(lambda spec: P(first[spec[0]], *spec[1:]), expert_specs(experts))

  monkeypatch.setattr(dispatchers, 'expert_specs', whole_specs)
  seen = axes_of_expert_weights(compiled_step(experiment(WAYS[0], FOUR)), make_mesh(FOUR).shape)
  assert ('all-gather', 'expert') in seen


def test_moved_rows_lie_in_the_order_of_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
  """And their gradients go the way back.

  Some devices send nothing to some, and one gets nothing from any.
  """
  emulate(monkeypatch)
  sent = np.array([[2, 0, 3, 0], [0, 1, 1, 0], [4, 0, 0, 0], [1, 2, 0, 0]], np.int32)
  own, room, width = 6, 7, 3  # rows of each, of which the first are sent; the most that one gets
  rng = np.random.default_rng(0)
  rows, d = (rng.normal(size=(4, n, width)).astype(np.float32) for n in (own, room))
  want, want_back = np.zeros_like(d), np.zeros_like(rows)
  filled = [0] * 4  # rows that each receiver has by now
  for source in range(4):
    begin = 0
    for receiver, count in enumerate(sent[source]):
      put = filled[receiver]
      want[receiver, put : put + count] = rows[source, begin : begin + count]
      want_back[source, begin : begin + count] = d[receiver, put : put + count]
      filled[receiver] += count
      begin += count

  def both(rows: Array, d: Array, sent: Array) -> tuple[Array, Array]:
    y, pull = jax.vjp(lambda rows: send_rows(rows, sent, room), rows)
    return y, *pull(d)

  mesh = make_mesh(MeshConfig(1, expert=4), jax.devices()[:4])
  with jax.set_mesh(mesh):
    spread = jax.shard_map(both, in_specs=(P('expert'), P('expert'), P()), out_specs=P('expert'))
    compiled = jax.jit(spread, compiler_options=QUICK)
    got = compiled(rows.reshape(-1, width), d.reshape(-1, width), sent)
  for a, b in zip(got, (want, want_back)):
    np.testing.assert_array_equal(np.asarray(a).reshape(b.shape), b)


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
  monkeypatch.setattr(dispatchers, 'lacking_ragged', lambda mesh: '')
  assert 'ragged_all_to_all' in traced(auto, FOUR)
  alone = traced(auto, MeshConfig(4, fsdp=2))
  assert {*re.findall(r"axis_name=\(?'(\w+)'", alone)} == {'fsdp'}, 'every device has all experts'
