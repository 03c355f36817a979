"""The mesh of a run: what the config asks for, held against the devices, the batch and every parameter.

  config -> what each mesh axis must divide -> the mesh, or one error of everything that does not divide, and the
  nearest mesh that would do
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import logging
import math
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from moejax.config import ConfigError
from moejax.experiment import ExperimentConfig
from moejax.sharding import (MESH_AXES, RULES, MeshConfig, is_param, make_mesh, of_one_process, param_axes,
                             product_problem, resolved)
from moejax.state import shapes_of

log = logging.getLogger(__name__)


class Part(NamedTuple):
  """A number of things that some mesh axes cut into equal parts."""

  number: int
  axes: tuple[str, ...]
  what: str

  def problem(self, mesh: MeshConfig) -> str:
    """What is wrong where the mesh does not divide it, '' where it does."""
    sizes = {axis: getattr(mesh, axis) for axis in self.axes}
    shards = math.prod(sizes.values())
    if self.number % shards == 0:
      return ''
    over = f'mesh.{self.axes[0]}={shards}' if len(sizes) == 1 else f'{" * ".join(sizes)} = {shards} devices'
    return f'{self.what.format(self.number)} do not divide over {over}: {-(-self.number // shards) * shards} would'


def parts_of(cfg: ExperimentConfig) -> list[Part]:
  """Rows of a micro-batch, heads, and the dimensions of every parameter that RULES splits; each number once."""
  model, state = cfg.model, shapes_of(cfg)
  parts = [Part(cfg.batch_size // cfg.micro_batches, RULES['batch'], 'config.batch_size / micro_batches = {} rows'),
           Part(model.attention.num_heads, RULES['heads'], 'config.model.attention.num_heads={} heads')]
  names = {'vocab': 'config.model.vocab_size={} tokens', 'expert': 'config.model.moe.router.num_experts={} experts'}
  for path, param in jax.tree.leaves_with_path(state, is_leaf=is_param):
    axes = param_axes(param) if is_param(param) else ()
    where = f'{jax.tree_util.keystr(path, simple=True, separator=".")} {list(param.shape)}'
    parts += [Part(number, RULES[axis], names[axis] if axis in names else f'the {{}} {axis} channels of {where}')
              for number, axis in zip(param.shape, axes) if axis and RULES[axis]]
  first: dict[tuple[int, tuple[str, ...]], Part] = {}
  for part in parts:
    first.setdefault((part.number, part.axes), part)
  return [*first.values()]


def mesh_of(cfg: ExperimentConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """The mesh that cfg.mesh asks for, over these devices ((): all there are).

  Raises:
    ConfigError: it does not divide the devices, the rows of a micro-batch, or a parameter; with the nearest that does.
  """
  devices, parts = devices or jax.devices(), parts_of(cfg)
  asked = resolved(cfg.mesh, len(devices))
  problems = [product_problem(cfg.mesh, devices), *(part.problem(asked) for part in parts)]
  if any(problems):
    raise ConfigError(*filter(None, problems), nearest(cfg.mesh, parts, devices))
  mesh = make_mesh(cfg.mesh, devices)
  if mesh.size < len(devices):
    log.info('mesh of %d devices: the other %d stay idle', mesh.size, len(devices) - mesh.size)
  return mesh


def nearest(asked: MeshConfig, parts: Sequence[Part], devices: Sequence[jax.Device]) -> str:
  """In words, with the flags to type, the mesh most like this one that divides all parts.

  As many devices as are asked for; if none of those do, all devices, and then fewer and fewer of them. Among those, the
  fewest sizes changed, those by the smallest factors, and rather `data` than another.
  """
  full, count = resolved(asked, len(devices)), len(devices)
  wanted = math.prod(dataclasses.astuple(full))
  wanted = wanted if asked.data and wanted < count else count

  def distance(mesh: MeshConfig) -> tuple[int, float, float]:
    data, *others = (abs(math.log2(getattr(mesh, axis) / getattr(full, axis))) for axis in MESH_AXES)
    factors = [data * (asked.data > 0), *others]
    return sum(factor > 0 for factor in factors), sum(factors), sum(others)

  for number in dict.fromkeys([wanted, *range(count, 0, -1)]) if of_one_process(devices) else [count]:
    if fit := [mesh for mesh in meshes_of(number) if not any(part.problem(mesh) for part in parts)]:
      return described(min(fit, key=distance), asked, count)
  return f'no mesh of {count} devices would do: mend the numbers above'


def meshes_of(number: int) -> Iterator[MeshConfig]:
  """Every mesh of so many devices."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  for sizes in itertools.product(divisors, repeat=3):
    if number % math.prod(sizes) == 0:
      yield MeshConfig(number // math.prod(sizes), *sizes)


def described(mesh: MeshConfig, asked: MeshConfig, count: int) -> str:
  """The flags that make one mesh of another."""
  sizes = dataclasses.asdict(mesh)
  if math.prod(sizes.values()) == count and not asked.data:
    del sizes['data']   # it takes what is left
  flags = ' '.join(f'--config.mesh.{axis}={size}' for axis, size in sizes.items() if size != getattr(asked, axis))
  product = math.prod(dataclasses.astuple(mesh))
  return f'the nearest mesh that would do, of {product} device{"s" * (product > 1)} out of {count}: {flags}'
