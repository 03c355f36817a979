"""The shapes of a run's arrays, and its mesh: what the config asks for, held against the devices,
the batch and every parameter.

  config -> what each mesh axis must divide -> the mesh, or one error of everything that does not
  divide, and the nearest mesh that would do
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.sharding.divisibility import Part, nearest
from moejax.sharding.logical_axes import RULES, spec
from moejax.sharding.mesh import make_mesh, product_problem, resolve_mesh
from moejax.sharding.params import is_param, param_axes, shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.train_state import TrainState, init_state

log = logging.getLogger(__name__)

# logical axis -> what the config calls the number that lies along it
CONFIG_NAMES = {
  'vocab': 'config.model.vocab_size={} tokens',
  'expert': 'config.model.moe.router.num_experts={} experts',
}


def sharded_state_shapes(cfg: ExperimentConfig, mesh: Mesh) -> TrainState:
  """ShapeDtypeStructs of a run's state, with shardings."""

  def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  shapes = state_shapes(cfg)
  return jax.tree.map(place, shapes, shardings(shapes, mesh))


def batch_shapes(cfg: ExperimentConfig, mesh: Mesh) -> Batch:
  """ShapeDtypeStructs of a global batch, its rows split over the mesh."""
  rows = NamedSharding(mesh, spec('batch'))

  def shape(dtype: jnp.dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((cfg.batch_size, *sizes), dtype, sharding=rows)

  numbers, flags = shape(jnp.int32, cfg.seq_len), shape(jnp.bool_, cfg.seq_len)
  return Batch(
    tokens=numbers,
    targets=numbers,
    mask=flags,
    segment_ids=numbers,
    positions=numbers,
    task_ids=shape(jnp.int32),
  )


# Two, for a run that starts from another one's model asks for the shapes of both.
@functools.lru_cache(maxsize=2)
def state_shapes(cfg: ExperimentConfig) -> TrainState:
  """ShapeDtypeStructs of `init_state`, without shardings.

  Cached: the mesh is held against them, and then the step is compiled for them.
  """
  return jax.eval_shape(functools.partial(init_state, cfg))


def divided_parts(cfg: ExperimentConfig) -> list[Part]:
  """What the axes of a mesh must divide, each number once for the same axes.

  That is the rows of a micro-batch, the heads, and the dimensions of every parameter that RULES
  splits.
  """
  rows, heads = cfg.batch_size // cfg.micro_batches, cfg.model.attention.num_heads
  parts = [
    Part(rows, RULES['batch'], 'config.batch_size / micro_batches = {} rows'),
    Part(heads, RULES['heads'], 'config.model.attention.num_heads={} heads'),
  ]
  for path, param in jax.tree.leaves_with_path(state_shapes(cfg), is_leaf=is_param):
    if is_param(param):
      parts += parts_of_param(jax.tree_util.keystr(path, simple=True, separator='.'), param)
  # Of parts alike the first is told: moments of the optimiser have the shapes of parameters.
  first: dict[tuple[int, tuple[str, ...]], Part] = {}
  for part in parts:
    first.setdefault((part.number, part.axes), part)
  return [*first.values()]


def parts_of_param(path: str, param: nnx.Variable) -> list[Part]:
  """The dimensions of a parameter that RULES splits, named as the config does where it does."""
  parts = []
  for number, axis in zip(param.shape, param_axes(param)):
    if not axis or not RULES[axis]:
      continue
    if axis in CONFIG_NAMES:
      name = CONFIG_NAMES[axis]
    else:
      name = f'the {{}} {axis} channels of {path} {list(param.shape)}'
    parts.append(Part(number, RULES[axis], name))
  return parts


def make_run_mesh(cfg: ExperimentConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """The mesh that cfg.mesh asks for, over these devices ((): all there are).

  Raises:
    ConfigError: it does not divide the devices, the rows of a micro-batch, or a parameter; with the
      nearest that does.
  """
  devices, parts = devices or jax.devices(), divided_parts(cfg)
  asked = resolve_mesh(cfg.mesh, len(devices))
  # All at once: who mends one number at a time would start as often as there are problems.
  problems = [product_problem(cfg.mesh, devices), *(part.problem(asked) for part in parts)]
  if any(problems):
    raise ConfigError(*filter(None, problems), nearest(cfg.mesh, parts, devices))
  mesh = make_mesh(cfg.mesh, devices)
  if mesh.size < len(devices):
    log.info('mesh of %d devices: the other %d stay idle', mesh.size, len(devices) - mesh.size)
  return mesh
