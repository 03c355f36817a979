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
  axes: tuple[str, ...]  # of the mesh
  what: str  # the things in words, with {} for their number

  def problem(self, mesh: MeshConfig) -> str:
    """Returns what is wrong where the mesh does not divide the number, '' where it does."""
    sizes = {axis: getattr(mesh, axis) for axis in self.axes}
    shards = math.prod(sizes.values())
    if self.number % shards == 0:
      return ''
    if len(sizes) == 1:
      divisor = f'mesh.{self.axes[0]}={shards}'
    else:
      divisor = f'{" * ".join(sizes)} = {shards} devices'
    next_multiple = math.ceil(self.number / shards) * shards
    things = self.what.format(self.number)
    return f'{things} do not divide over {divisor}: {next_multiple} would'


def nearest(asked: MeshConfig, parts: Sequence[Part], devices: Sequence[jax.Device]) -> str:
  """Returns in words, with the flags to type, the mesh most like this one that divides all parts.

  It is of as many devices as are asked for; where no such mesh divides all, of all devices, then of
  fewer and fewer. Among the meshes of one size it is the one with the fewest axes changed, then
  with the smallest factors of change, and rather of `data` than of another axis.

  Args:
    asked: the mesh of the config.
    devices: all that there are.
    parts: what it must divide.
  """
  count = len(devices)
  full = resolve_mesh(asked, count)

  def divides_all(mesh: MeshConfig) -> bool:
    return not any(part.problem(mesh) for part in parts)

  def distance(mesh: MeshConfig) -> tuple[int, float, float]:
    # In logarithms, so that to halve an axis is as far as to double it.
    factors = [abs(math.log2(getattr(mesh, axis) / getattr(full, axis))) for axis in MESH_AXES]
    if not asked.data:
      factors[0] = 0.0  # `data` was left to the devices: another number for it is no change
    changed = sum(factor > 0 for factor in factors)
    return changed, sum(factors), sum(factors[1:])

  for number in _mesh_sizes_to_try(asked, full, devices):
    fitting = [mesh for mesh in meshes_of(number) if divides_all(mesh)]
    if fitting:
      return mesh_flags(min(fitting, key=distance), asked, count)
  return f'no mesh of {count} devices would do: mend the numbers above'


def _mesh_sizes_to_try(
  asked: MeshConfig, full: MeshConfig, devices: Sequence[jax.Device]
) -> list[int]:
  """Returns numbers of devices that a mesh may have, the best first."""
  count = len(devices)
  if not of_one_process(devices):  # each process must have a part in the mesh
    return [count]
  downwards = list(range(count, 0, -1))
  wanted = math.prod(dataclasses.astuple(full))
  return [wanted, *downwards] if asked.data and wanted < count else downwards


def meshes_of(number: int) -> Iterator[MeshConfig]:
  """Yields every mesh of so many devices."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  for sizes in itertools.product(divisors, repeat=3):
    if number % math.prod(sizes) == 0:
      yield MeshConfig(number // math.prod(sizes), *sizes)


def mesh_flags(mesh: MeshConfig, asked: MeshConfig, count: int) -> str:
  """Returns in words the flags that make `mesh` of the mesh that is asked for.

  Args:
    mesh: the mesh that would do.
    asked: the mesh of the config.
    count: how many devices there are.
  """
  sizes = dataclasses.asdict(mesh)
  product = math.prod(sizes.values())
  if product == count and not asked.data:
    del sizes['data']  # it takes what the others leave
  flags = ' '.join(
    f'--config.mesh.{axis}={size}' for axis, size in sizes.items() if size != getattr(asked, axis)
  )
  devices = 'device' if product == 1 else 'devices'
  return f'the nearest mesh that would do, of {product} {devices} out of {count}: {flags}'
