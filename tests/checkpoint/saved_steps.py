"""Steps saved from known states, and the ways in which their files are damaged."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.checkpoint import manifest
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints

DATA = {'source': 'stdlib', 'seed': '0'}


class State(NamedTuple):
  step: jax.Array
  model: dict[str, dict[str, jax.Array]]
  router: jax.Array


def state(seed: int = 0) -> State:
  x = jax.random.normal(jax.random.key(seed), (64, 40))
  blocks = {'gate': x, 'up': x.astype(jnp.bfloat16)}
  return State(jnp.int32(seed), {'blocks': blocks}, jnp.full((2, 4), seed, jnp.float32))


class Layer(nnx.Module):
  def __init__(self) -> None:
    self.value = nnx.Param(jnp.ones(2))
    self.parts = nnx.List([nnx.Param(jnp.zeros(1))])


def write(root: Path, metrics: dict[int, float], cfg: CheckpointConfig) -> list[int]:
  checkpoints = Checkpoints(root, cfg)
  for step, metric in metrics.items():
    checkpoints.save(step, state(step), DATA, metric)
  checkpoints.close()
  return checkpoints.steps.all()


def read(root: Path) -> tuple[int, State]:
  step, tree, _ = Checkpoints(root, CheckpointConfig(), readonly=True).restore(state(), DATA)
  assert manifest.digest(tree) == manifest.digest(state(step))  # whatever is returned is right
  return step, tree


def largest(directory: Path) -> Path:
  return max((p for p in directory.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def zero(path: Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Bomb:
  """Makes a directory when it is unpickled."""

  def __init__(self, path: Path) -> None:
    self.path = path

  def __reduce__(self) -> tuple[object, ...]:
    return os.mkdir, (str(self.path),)
