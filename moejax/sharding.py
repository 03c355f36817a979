"""The device mesh, and the one table that says which mesh axis each logical axis is split over.

Mathematics elsewhere names logical axes only: `constrain(x, 'batch', 'sequence', 'embed')`. Outside a mesh (a unit
test, a notebook cell) constraints do nothing, so every function also runs on plain arrays.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import TypeVar

from flax import nnx
import jax
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax.config import check

Tree = TypeVar('Tree')

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')

# Tokens are split over `expert` too: expert parallelism divides the same tokens that data parallelism would, and
# exchanges them only inside a dispatcher.
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp', 'expert'),
  'sequence': (),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'expert': ('expert',),
  'vocab': ('tensor',),
  'layer': (),
  'norm': (),
}


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
      *(f'{name}={size}: use 1 or more'
        for name, size in (('fsdp', self.fsdp), ('expert', self.expert), ('tensor', self.tensor)) if size < 1),
    )


def resolved(cfg: MeshConfig, devices: int) -> MeshConfig:
  """With a number for `data`, also where the config leaves it to the devices."""
  return dataclasses.replace(cfg, data=cfg.data or max(1, devices // (cfg.fsdp * cfg.expert * cfg.tensor)))


def of_one_process(devices: Sequence[jax.Device]) -> bool:
  """Whether some of the devices will do: where there are more processes, each must have a part in every program."""
  return len({device.process_index for device in devices}) == 1


def product_problem(cfg: MeshConfig, devices: Sequence[jax.Device]) -> str:
  """What is wrong with the product of a mesh's sizes, '' if nothing. With `data` given, one process may leave some."""
  full, count = resolved(cfg, len(devices)), len(devices)
  product = math.prod(dataclasses.astuple(full))
  if product == count or product < count and cfg.data and of_one_process(devices):
    return ''
  sizes = ' * '.join(f'{axis}={size}' for axis, size in dataclasses.asdict(full).items())
  return f'mesh {sizes} = {product}, but there are {count} devices: use sizes whose product is {count}'


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] = ()) -> Mesh:
  """A mesh over these devices ((): all there are), which may be of a topology that is not here, or the first of them.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices, see `product_problem`.
  """
  devices = devices or jax.devices()
  check(product_problem(cfg, devices))
  shape = dataclasses.astuple(resolved(cfg, len(devices)))
  # What jax.make_mesh does, but it refuses most meshes of a TPU slice: those with an axis along a part of a torus axis.
  placed = mesh_utils.create_device_mesh(shape, devices[:math.prod(shape)], allow_split_physical_axes=True)
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the program being traced will run on, also when it is compiled for absent chips."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def row_shards() -> int:
  """Into how many pieces the mesh at hand cuts the rows of a batch; 1 without a mesh."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[axis] for axis in RULES['batch'] if axis in sizes)


def spec(*axes: str) -> PartitionSpec:
  """The mesh axes of these logical axes; '' leaves a dimension whole."""
  return PartitionSpec(*(RULES[axis] or None if axis else None for axis in axes))


def constrain(x: Array, *axes: str) -> Array:
  """`x` with its dimensions laid out as RULES says; `x` itself where there is no mesh or only one device.

  A dimension that its mesh axes do not divide stays whole, as key-value heads do where there are fewer than devices:
  XLA would pad it, and then find no other way than to gather everything.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  divided = (axis if axis and n % math.prod(mesh.shape[name] for name in RULES[axis]) == 0 else ''
             for axis, n in zip(axes, x.shape, strict=True))
  return jax.lax.with_sharding_constraint(x, spec(*divided))


def is_param(node: object) -> bool:
  """For `jax.tree.map(..., is_leaf=is_param)`: stop at a parameter, where its logical axes are written."""
  return isinstance(node, nnx.Variable)


def param_axes(param: nnx.Variable) -> tuple[str, ...]:
  """The logical axes of a parameter; a stack of layers made by `jax.vmap` has some that its metadata does not know."""
  axes = param.get_metadata('axes')
  return ('layer',) * (len(param.shape) - len(axes)) + tuple(axes)


def param_spec(param: nnx.Variable) -> PartitionSpec:
  """The mesh axes of a parameter's dimensions."""
  return spec(*param_axes(param))


def shardings(tree: Tree, mesh: Mesh) -> Tree:
  """The sharding of every leaf of `tree`, in its structure: parameters by their axes, anything else replicated."""

  def of(node: object) -> object:
    where = param_spec(node) if is_param(node) else PartitionSpec()
    return jax.tree.map(lambda _: NamedSharding(mesh, where), node)

  return jax.tree.map(of, tree, is_leaf=is_param)


def size(tree: object) -> int:
  """Numbers in all the arrays of a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
