"""The device mesh: the sizes that a config asks for, checked against the devices that exist."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moejax.config import at_least, check

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; `data = 0` takes whatever the other three leave."""

  data: int = 0  # copies of the parameters, each for other tokens
  fsdp: int = 1  # parts of the parameters' embed axis, gathered for use; other tokens each
  expert: int = 1  # parts of the experts; other tokens each
  tensor: int = 1  # parts of heads, hidden units and vocabulary, for the same tokens

  def __post_init__(self) -> None:
    check(
      *at_least(0, self, 'data', meaning='the devices that are left'),
      *at_least(1, self, 'fsdp', 'expert', 'tensor'),
    )


def resolve_mesh(cfg: MeshConfig, devices: int) -> MeshConfig:
  """Returns the config with a number for `data`, also where it is left to the number of devices.

  Whether the sizes then multiply to the number of devices is not checked; see `product_problem`.
  """
  if cfg.data:
    return cfg
  others = cfg.fsdp * cfg.expert * cfg.tensor
  return dataclasses.replace(cfg, data=max(1, devices // others))


def of_one_process(devices: Sequence[jax.Device]) -> bool:
  """Tells whether one process has all the devices, so that a mesh may leave some of them out.

  Where there are more processes, each must have a part in every program.
  """
  return len({device.process_index for device in devices}) == 1


def product_problem(cfg: MeshConfig, devices: Sequence[jax.Device]) -> str:
  """Returns what is wrong with the product of a mesh's sizes, '' if nothing is.

  Where `data` is given and one process has all devices, the mesh may be of fewer than there are.
  """
  count = len(devices)
  full = resolve_mesh(cfg, count)
  product = math.prod(dataclasses.astuple(full))
  may_be_smaller = cfg.data > 0 and of_one_process(devices)
  if product == count or (product < count and may_be_smaller):
    return ''
  sizes = ' * '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(full).items())
  return (
    f'mesh {sizes} = {product}, but there are {count} devices: use sizes whose product is {count}'
  )


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """Returns a mesh over the devices, or over the first of them where its sizes ask for fewer.

  Args:
    cfg: the sizes.
    devices: may be those of a topology that this machine does not have, to compile for; (): all
      that there are.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, see `product_problem`.
  """
  devices = devices or jax.devices()
  check(product_problem(cfg, devices))
  shape = dataclasses.astuple(resolve_mesh(cfg, len(devices)))
  # What jax.make_mesh does, but that refuses most meshes of a TPU slice: those in which an axis
  # lies along a part of a torus axis.
  grid = mesh_utils.create_device_mesh(
    shape, devices[: math.prod(shape)], allow_split_physical_axes=True
  )
  # Auto: XLA lays out what `constrain` leaves open.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 4)
