"""How the kernels for NVIDIA GPUs cut their work, and which GPUs take them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.experts.grouped_ffn import best_implementation
from moejax.moe.experts.sorted_copies import Copies, sort_copies
from moejax.moe.experts.triton import support
from moejax.moe.experts.triton.tiles import (
  FLOAT32_TILES,
  HALF_TILES,
  LEAST,
  power_of_two,
  row_tiles,
  tile_sizes,
)


def test_row_tiles_hold_every_assigned_copy_once() -> None:
  for seed in range(6):
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 70, int(rng.integers(1, 9))).astype(np.int32)
    num_copies, rows = int(load.sum() + rng.integers(0, 50)) or 1, int(2 ** rng.integers(4, 7))
    expert_G, first_G, end_G = map(np.asarray, row_tiles(jnp.asarray(load), num_copies, rows))
    owner = np.full(num_copies, -1)
    for e, first, end in zip(expert_G, first_G, end_G):
      held = slice(first, min(first + rows, end))
      assert (owner[held] == -1).all()
      owner[held] = e
    assert owner.tolist() == [*np.repeat(np.arange(load.size), load), *[-1] * (owner == -1).sum()]
    assert (owner == -1).sum() == num_copies - load.sum()


def copies_of(count: int, num_experts: int) -> Copies:
  """Copies of which nothing but their number matters."""
  return Copies(np.zeros(count, np.int32), np.zeros(count), np.zeros(num_experts, np.int32))


def test_tiles_are_no_larger_than_what_there_is() -> None:
  for table, dtype in ((HALF_TILES, jnp.bfloat16), (FLOAT32_TILES, jnp.float32)):
    for kernel, tile in table.items():
      assert tile_sizes(kernel, dtype, copies_of(1 << 20, 8), columns=4096, depth=4096) == tile
      small = tile_sizes(kernel, dtype, copies_of(9, 8), columns=20, depth=3)
      assert small[:3] == (LEAST, 32, LEAST)
  assert [power_of_two(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


class Gpu(NamedTuple):
  """What JAX tells of a device."""

  device_kind: str
  compute_capability: str


@pytest.mark.parametrize(
  ('gpu', 'reason'),
  [
    (Gpu('NVIDIA H200', '9.0'), ''),
    (Gpu('NVIDIA A100', '8.0'), ''),
    (Gpu('NVIDIA B200', '10.0'), ''),
    (Gpu('Tesla V100', '7.0'), 'Tesla V100 has compute capability 7.0, and the kernels need 8.0'),
    (Gpu('AMD Instinct MI300X', 'gfx942'), 'AMD Instinct MI300X is not an NVIDIA GPU'),
  ],
  ids=str,
)
def test_a_gpu_without_what_the_kernels_need_takes_the_next_row(
  gpu: Gpu, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  monkeypatch.setattr('moejax.moe.experts.grouped_ffn.platform', lambda: 'gpu')
  monkeypatch.setattr(support.jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(support.jax, 'local_devices', lambda: [gpu])
  support.is_usable.cache_clear()
  copies = sort_copies(jnp.zeros((64, 2), jnp.int32), jnp.zeros((64, 2)), 8)
  with caplog.at_level('WARNING'):
    chosen = [best_implementation(copies) for _ in range(2)]
  support.is_usable.cache_clear()
  assert support.lacking() == reason
  assert chosen == ['blocked' if reason else 'triton'] * 2
  told = [record.getMessage() for record in caplog.records]
  slow = 'they run as a loop over blocks of rows, which is slow'
  assert told == ([f'experts: {reason}: {slow}'] if reason else [])


def test_a_jax_without_pallas_for_triton_takes_the_next_row(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(support.importlib.util, 'find_spec', lambda name: None)
  assert support.lacking() == f'JAX {jax.__version__} has no Pallas for Triton'
