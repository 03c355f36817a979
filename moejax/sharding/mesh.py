"""The device mesh: the sizes that a config asks for, checked against the devices that are there."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moejax.config import check

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; `data = 0` takes whatever the other three leave."""

  data: int = 0
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def __post_init__(self) -> None:
    check(
      f'data={self.data}: use 0 (the devices that are left) or more' if self.data < 0 else '',
      *(
        f'{name}={size}: use 1 or more'
        for name, size in (('fsdp', self.fsdp), ('expert', self.expert), ('tensor', self.tensor))
        if size < 1
      ),
    )


def resolve_mesh(cfg: MeshConfig, devices: int) -> MeshConfig:
  """With a number for `data`, also where the config leaves it to the devices."""
  return dataclasses.replace(
    cfg, data=cfg.data or max(1, devices // (cfg.fsdp * cfg.expert * cfg.tensor))
  )


def of_one_process(devices: Sequence[jax.Device]) -> bool:
  """Whether some of the devices will do: where there are more processes, each must have a part in every program."""
  return len({device.process_index for device in devices}) == 1


def product_problem(cfg: MeshConfig, devices: Sequence[jax.Device]) -> str:
  """What is wrong with the product of a mesh's sizes, '' if nothing. With `data` given, one process may leave some."""
  full, count = resolve_mesh(cfg, len(devices)), len(devices)
  product = math.prod(dataclasses.astuple(full))
  if product == count or product < count and cfg.data and of_one_process(devices):
    return ''
  sizes = ' * '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(full).items())
  return (
    f'mesh {sizes} = {product}, but there are {count} devices: use sizes whose product is {count}'
  )


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """A mesh over these devices ((): all there are), which may be of a topology that is not here, or the first of them.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, see `product_problem`.
  """
  devices = devices or jax.devices()
  check(product_problem(cfg, devices))
  shape = dataclasses.astuple(resolve_mesh(cfg, len(devices)))
  # What jax.make_mesh does, but it refuses most meshes of a TPU slice: those with an axis along a part of a torus axis.
  placed = mesh_utils.create_device_mesh(
    shape, devices[: math.prod(shape)], allow_split_physical_axes=True
  )
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
