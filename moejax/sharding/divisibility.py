"""What the axes of a mesh must divide, and the nearest mesh that would do where one does not."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from moejax.sharding.mesh import MESH_AXES, MeshConfig, of_one_process, resolve_mesh


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
    over = (
      f'mesh.{self.axes[0]}={shards}'
      if len(sizes) == 1
      else f'{" * ".join(sizes)} = {shards} devices'
    )
    return f'{self.what.format(self.number)} do not divide over {over}: {-(-self.number // shards) * shards} would'


def nearest(asked: MeshConfig, parts: Sequence[Part], devices: Sequence[jax.Device]) -> str:
  """In words, with the flags to type, the mesh most like this one that divides all parts.

  As many devices as are asked for; if none of those do, all devices, and then fewer and fewer of them. Among those, the
  fewest sizes changed, those by the smallest factors, and rather `data` than another.
  """
  full, count = resolve_mesh(asked, len(devices)), len(devices)
  wanted = math.prod(dataclasses.astuple(full))
  wanted = wanted if asked.data and wanted < count else count

  def distance(mesh: MeshConfig) -> tuple[int, float, float]:
    data, *others = (
      abs(math.log2(getattr(mesh, axis) / getattr(full, axis))) for axis in MESH_AXES
    )
    factors = [data * (asked.data > 0), *others]
    return sum(factor > 0 for factor in factors), sum(factors), sum(others)

  for number in (
    dict.fromkeys([wanted, *range(count, 0, -1)]) if of_one_process(devices) else [count]
  ):
    if fit := [mesh for mesh in meshes_of(number) if not any(part.problem(mesh) for part in parts)]:
      return mesh_flags(min(fit, key=distance), asked, count)
  return f'no mesh of {count} devices would do: mend the numbers above'


def meshes_of(number: int) -> Iterator[MeshConfig]:
  """Every mesh of so many devices."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  for sizes in itertools.product(divisors, repeat=3):
    if number % math.prod(sizes) == 0:
      yield MeshConfig(number // math.prod(sizes), *sizes)


def mesh_flags(mesh: MeshConfig, asked: MeshConfig, count: int) -> str:
  """The flags that make one mesh of another."""
  sizes = dataclasses.asdict(mesh)
  if math.prod(sizes.values()) == count and not asked.data:
    del sizes['data']  # it takes what is left
  flags = ' '.join(
    f'--config.mesh.{axis}={size}' for axis, size in sizes.items() if size != getattr(asked, axis)
  )
  product = math.prod(dataclasses.astuple(mesh))
  return f'the nearest mesh that would do, of {product} device{"s" * (product > 1)} out of {count}: {flags}'
