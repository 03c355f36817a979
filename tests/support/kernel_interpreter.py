"""Runs the kernels for GPUs as ordinary JAX, stricter than Pallas's interpreter.

Pallas's own does not run under `shard_map` with its check of varying axes. This one does, and
whatever a kernel must not rely on is NaN, or a number far off: results before they are stored, and
what a load without a mask reads past the end of an array.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.experimental import pallas
from jax.experimental.pallas import triton

from moejax.moe.experts.triton import hidden_gradient, outer_products, products, token_sums

FAR_OFF = -(2**30)  # as an index, of nothing


class Place(NamedTuple):
  """A part of an array in memory, as `ref.at[indices]` gives it."""

  memory: 'Memory'
  indices: tuple[Array, ...]


class Memory:
  """An array that a kernel may load from and store to; also its own `at`."""

  def __init__(self, value: Array) -> None:
    self.value = value

  @property
  def at(self) -> 'Memory':
    return self

  @property
  def shape(self) -> tuple[int, ...]:
    return self.value.shape

  @property
  def dtype(self) -> jnp.dtype:
    return self.value.dtype

  def __getitem__(self, indices: tuple[Array, ...]) -> Place:
    return Place(self, indices)


def poison(dtype: jnp.dtype) -> float:
  """What nobody may rely on."""
  return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else FAR_OFF


def load(place: Place, mask: Array | None = None, other: Array | None = None) -> Array:
  """As triton.load."""
  memory, indices = place
  values = memory.value.at[indices].get(mode='fill', fill_value=poison(memory.dtype))
  return values if mask is None else jnp.where(mask, values, other)


def store(place: Place, values: Array, mask: Array) -> None:
  """As triton.store; a store past the end of an array poisons all of it."""
  memory, indices = place
  shape = jnp.broadcast_shapes(*map(jnp.shape, indices))
  whole = [jnp.broadcast_to(index, shape) for index in indices]
  is_inside = jnp.ones(shape, bool)
  for index, size in zip(whole, memory.shape):
    is_inside &= (index >= 0) & (index < size)
  first = jnp.where(mask, whole[0], memory.shape[0])
  stored = memory.value.at[(first, *whole[1:])].set(values, mode='drop')
  is_sound = (is_inside | ~mask).all()
  memory.value = jnp.where(is_sound, stored, jnp.asarray(poison(memory.dtype), memory.dtype))


def varying(a: Array) -> Array:
  """The array, varying over every axis of the mesh: a loop's carry must from the start."""
  kind = jax.typeof(a)
  known = kind.manual_axis_type.varying if hasattr(kind, 'manual_axis_type') else kind.vma
  axes = jax.sharding.get_abstract_mesh().manual_axes
  missing = tuple(axis for axis in axes if axis not in known)
  return jax.lax.pcast(a, missing, to='varying') if missing else a


def interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Lets `call_kernel` run kernels here, for as long as the test lasts.

  Returns:
    The names of the kernels called, which grows with each call.
  """
  program: list[Array] = []
  called: list[str] = []
  fori_loop = jax.lax.fori_loop

  def varying_loop(lower: object, upper: object, body: Callable, carry: object) -> object:
    carry = jax.tree.map(lambda a: varying(jnp.asarray(a)), carry)
    return fori_loop(lower, upper, lambda i, c: jax.tree.map(varying, body(i, c)), carry)

  def call(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    out_shapes: tuple[jax.ShapeDtypeStruct, ...],
    arguments: tuple[Array, ...],
    **machine: int,
  ) -> tuple[Array, ...]:
    del machine  # warps and stages, which change no number
    called.append(name)
    arguments = tuple(map(varying, arguments))

    def run_program(number: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
      place = []
      for size in grid:
        place.append(number % size)
        number = number // size
      program[:] = place
      results = [Memory(out) for out in outs]
      kernel(*map(Memory, arguments), *results)
      return tuple(result.value for result in results)

    outs = tuple(jnp.full(out.shape, poison(out.dtype), out.dtype) for out in out_shapes)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax.lax, 'fori_loop', varying_loop)
      return varying_loop(jnp.int32(0), jnp.int32(math.prod(grid)), run_program, outs)

  monkeypatch.setattr(pallas, 'program_id', lambda axis: program[axis])
  monkeypatch.setattr(triton, 'load', load)
  monkeypatch.setattr(triton, 'store', store)
  for module in (hidden_gradient, outer_products, products, token_sums):
    monkeypatch.setattr(module, 'call_kernel', call)
  return called
