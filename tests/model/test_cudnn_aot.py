"""Attention of packed documents compiled ahead of time for H200s: what its program holds.

Nothing here asks cuDNN: whether it has a kernel for these sizes is seen where a GPU is.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import NamedSharding
from jax.stages import Compiled

from moejax.model.attention_cores import attend_by, core_for
from moejax.model.cudnn_attention import SELDOM
from moejax.plan.topology import parse_topology
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.absent_chips import needs_compiler

pytestmark = needs_compiler('jax_cuda13_plugin')
S = 4096


def compile_both(
  topology: str, sizes: MeshConfig, heads: tuple[int, int], widths: tuple[int, int], window: int
) -> Compiled:
  """Both passes under remat; four rows for each part of the batch.

  Args:
    heads: of q, and of k and v.
    widths: of q and k, and of v.
  """
  mesh = make_mesh(sizes, parse_topology(topology).devices())

  def array(heads: int, width: int) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec('batch', '', 'heads', ''))
    return jax.ShapeDtypeStruct((4 * sizes.fsdp, S, heads, width), jnp.bfloat16, sharding=sharding)

  def both(q: Array, k: Array, v: Array, segments: Array, dy: Array) -> tuple[Array, tuple]:
    def attend(q: Array, k: Array, v: Array) -> Array:
      return attend_by('auto', q, k, v, segments, window=window, scale=0.1, sinks=None)

    y, pull = jax.vjp(jax.checkpoint(attend), q, k, v)
    return y, pull(dy)

  (h, j), (d, v_width) = heads, widths
  q, k, v, dy = array(h, d), array(j, d), array(j, v_width), array(h, v_width)
  rows = NamedSharding(mesh, spec('batch', ''))
  segments = jax.ShapeDtypeStruct((4 * sizes.fsdp, S), jnp.int32, sharding=rows)
  with jax.set_mesh(mesh):
    assert core_for('auto', q, k, v, has_sinks=False) == 'cudnn of packed documents'
    return jax.jit(both).lower(q, k, v, segments, dy).compile({'xla_gpu_autotune_level': 0})


@pytest.mark.parametrize(
  ('topology', 'sizes', 'heads', 'widths', 'window'),
  [
    ('h200:1', MeshConfig(), (16, 16), (128, 128), 0),
    ('h200:1', MeshConfig(), (16, 2), (128, 128), 512),
    ('h200:8', MeshConfig(fsdp=4, tensor=2), (16, 4), (192, 128), 0),
  ],
  ids=['OLMoE', 'grouped queries and a window', 'latent attention on a mesh'],
)
def test_no_mask_is_made_and_nothing_is_gathered(
  topology: str,
  sizes: MeshConfig,
  heads: tuple[int, int],
  widths: tuple[int, int],
  window: int,
) -> None:
  compiled = compile_both(topology, sizes, heads, widths, window)
  text = compiled.as_text()
  calls = re.findall(r'= \((\S+) .*"(__cudnn[^"]*)"', text)
  names = {name for _, name in calls}
  assert names == {'__cudnn$fmhaSoftmax', '__cudnn$fmhaSoftmaxBackward'}
  settings = {*re.findall(r'"(mask_type|sliding_window_length|max_seg_per_batch)": ?"?(\w+)', text)}
  assert settings == {
    ('mask_type', 'PADDING_CAUSAL'),
    ('sliding_window_length', str(window)),
    ('max_seg_per_batch', '16'),
  }
  assert not re.search(rf'\[[\d,]*{S},{S}\]', text)  # no array of scores, and no mask
  assert not re.search(r' (all-\w+|collective-\w+|reduce-scatter)(-start)?\(', text)
  loops = [line for line in text.splitlines() if ' while(' in line]
  assert len(loops) == 3 and all(SELDOM in line for line in loops)
  # A second set of gradients, for the loop, and the log sums.
  rows, (h, j), width = 4, (heads[0] // sizes.tensor, heads[1] // sizes.tensor), max(widths)
  gradients = 2 * rows * S * width * (h + 2 * j)
  log_sums = 4 * 16 * rows * S * h
  padded = gradients + 2 * rows * S * width * h if widths[0] != widths[1] else 0
  assert compiled.memory_analysis().temp_size_in_bytes < 1.05 * (gradients + log_sums + padded)
