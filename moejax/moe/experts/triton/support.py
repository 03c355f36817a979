"""What the kernels take of Pallas, and whether this JAX and this GPU can run them.

The only file that imports Pallas for Triton, or knows how JAX's versions differ in it. Pallas is
imported when a kernel is built: nothing else should pay for it.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moejax.sharding.logical_axes import platform

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = 8.0  # Ampere: the first with bfloat16 products and asynchronous copies


def lacking() -> str:
  """Returns why the kernels cannot be used here, or '' if they can.

  A program that is compiled ahead of time is for a GPU of a description in moejax/plan/targets/:
  all of them can.
  """
  if importlib.util.find_spec('jax.experimental.pallas.triton') is None:
    return f'JAX {jax.__version__} has no Pallas for Triton'
  if jax.default_backend() != 'gpu':
    return ''
  device = jax.local_devices()[0]
  # '9.0' on NVIDIA; AMD's devices have a name there, such as 'gfx942'.
  capability = device.compute_capability
  if not capability.replace('.', '').isdigit():
    return f'{device.device_kind} is not an NVIDIA GPU'
  if float(capability) < LEAST_CAPABILITY:
    return (
      f'{device.device_kind} has compute capability {capability}, '
      f'and the kernels need {LEAST_CAPABILITY}'
    )
  return ''


@functools.cache
def is_usable() -> bool:
  """Whether the kernels can be used here; why not is logged, once."""
  reason = lacking()
  if reason:
    logger.warning('experts: %s: they run as a loop over blocks of rows, which is slow', reason)
  return not reason


def call_kernel(
  kernel: Callable[..., None],
  name: str,
  grid: tuple[int, ...],
  out_shapes: tuple[jax.ShapeDtypeStruct, ...],
  arguments: tuple[Array, ...],
  warps: int,
  stages: int,
) -> tuple[Array, ...]:
  """Runs a kernel for each point of a grid; interpreted where the platform is no GPU.

  Args:
    kernel: of references to the arguments, then to the results, whole arrays in memory.
    name: in a profile, and in the compiled program.
    grid: the first dimension runs fastest.
    out_shapes: of the results. Their elements hold anything until the kernel stores them.
    arguments: arrays.
    warps: of 32 threads, that work on one point.
    stages: loads in flight in a loop.
  """
  from jax.experimental import pallas
  from jax.experimental.pallas import triton

  varying = tuple(varies_as(shape, *arguments) for shape in out_shapes)
  return pallas.pallas_call(
    kernel,
    grid=grid,
    out_shape=varying,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=platform() != 'gpu',
    name=name,
  )(*arguments)


def varies_as(shape: jax.ShapeDtypeStruct, *arguments: Array) -> jax.ShapeDtypeStruct:
  """Returns the shape, varying over every mesh axis that one of the arguments varies over.

  Under `shard_map` JAX wants to be told. Versions after 0.11 have another name for it.
  """
  types = [jax.typeof(argument) for argument in arguments]
  if hasattr(types[0], 'manual_axis_type'):
    widest = max((t.manual_axis_type for t in types), key=lambda axes: len(axes.varying))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, manual_axis_type=widest)
  axes = frozenset().union(*(t.vma for t in types))
  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, vma=axes)


def load(ref: Array, indices: tuple[Array, ...], mask: Array | None = None) -> Array:
  """Loads `ref[indices]`; 0 where the mask is False, and nothing is read there.

  Args:
    ref: an array in memory.
    indices: one for each dimension, that broadcast: Pallas cannot mix arrays and slices.
    mask: of the shape that the indices broadcast to; None: all.
  """
  from jax.experimental.pallas import triton

  other = None if mask is None else jnp.zeros((), ref.dtype)
  return triton.load(ref.at[indices], mask=mask, other=other)


def store(ref: Array, indices: tuple[Array, ...], values: Array, mask: Array) -> None:
  """Stores the values, rounded to the dtype of the array, where the mask is True."""
  from jax.experimental.pallas import triton

  triton.store(ref.at[indices], values.astype(ref.dtype), mask=mask)


def program_id(axis: int) -> Array:
  """Returns where in the grid this program is."""
  from jax.experimental import pallas

  return pallas.program_id(axis)
