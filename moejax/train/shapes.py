"""The mesh of a run: what the config asks for, held against the devices, the batch and every parameter.

config -> what each mesh axis must divide -> the mesh, or one error of everything that does not divide, and the
nearest mesh that would do
"""

import functools
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.sharding.divisibility import Part, nearest
from moejax.sharding.logical_axes import RULES, spec
from moejax.sharding.mesh import make_mesh, product_problem, resolve_mesh
from moejax.sharding.params import is_param, param_axes, shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step.train_state import TrainState, init_state


def sharded_state_shapes(cfg: ExperimentConfig, mesh: Mesh) -> TrainState:
  """ShapeDtypeStructs of a run's state, with shardings."""
  shapes = state_shapes(cfg)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings(shapes, mesh)
  )


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


@functools.lru_cache(maxsize=2)
def state_shapes(cfg: ExperimentConfig) -> TrainState:
  """ShapeDtypeStructs of `init_state`. Kept: the mesh is held against them, and then the step is compiled for them."""
  return jax.eval_shape(functools.partial(init_state, cfg))


log = logging.getLogger(__name__)


def divided_parts(cfg: ExperimentConfig) -> list[Part]:
  """Rows of a micro-batch, heads, and the dimensions of every parameter that RULES splits; each number once."""
  model, state = cfg.model, state_shapes(cfg)
  parts = [
    Part(
      cfg.batch_size // cfg.micro_batches,
      RULES['batch'],
      'config.batch_size / micro_batches = {} rows',
    ),
    Part(model.attention.num_heads, RULES['heads'], 'config.model.attention.num_heads={} heads'),
  ]
  names = {
    'vocab': 'config.model.vocab_size={} tokens',
    'expert': 'config.model.moe.router.num_experts={} experts',
  }
  for path, param in jax.tree.leaves_with_path(state, is_leaf=is_param):
    axes = param_axes(param) if is_param(param) else ()
    where = f'{jax.tree_util.keystr(path, simple=True, separator=".")} {list(param.shape)}'
    parts += [
      Part(
        number,
        RULES[axis],
        names[axis] if axis in names else f'the {{}} {axis} channels of {where}',
      )
      for number, axis in zip(param.shape, axes)
      if axis and RULES[axis]
    ]
  first: dict[tuple[int, tuple[str, ...]], Part] = {}
  for part in parts:
    first.setdefault((part.number, part.axes), part)
  return [*first.values()]


def make_run_mesh(cfg: ExperimentConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """The mesh that cfg.mesh asks for, over these devices ((): all there are).

  Raises:
    ConfigError: it does not divide the devices, the rows of a micro-batch, or a parameter; with the nearest that does.
  """
  devices, parts = devices or jax.devices(), divided_parts(cfg)
  asked = resolve_mesh(cfg.mesh, len(devices))
  problems = [product_problem(cfg.mesh, devices), *(part.problem(asked) for part in parts)]
  if any(problems):
    raise ConfigError(*filter(None, problems), nearest(cfg.mesh, parts, devices))
  mesh = make_mesh(cfg.mesh, devices)
  if mesh.size < len(devices):
    log.info('mesh of %d devices: the other %d stay idle', mesh.size, len(devices) - mesh.size)
  return mesh
