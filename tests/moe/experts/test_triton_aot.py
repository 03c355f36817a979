"""The expert FFN compiled ahead of time for an H200: what its program must not have.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token.
"""

import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Compiled

from moejax.moe.experts.ffn import ACTIVATIONS
from moejax.moe.experts.grouped_ffn import grouped_ffn
from moejax.moe.experts.sorted_copies import sort_copies
from moejax.moe.experts.weights import Biases, Weights
from moejax.plan.hlo.memory_traffic import FREE, executed
from moejax.plan.hlo.program import parse_program
from moejax.plan.topology import parse_topology
from tests.support.absent_chips import needs_compiler

pytestmark = needs_compiler('jax_cuda13_plugin')
KERNELS = {
  'gate_up',
  'hidden_gradient',
  'outer_products',
  'rows_times_matrix',
  'rows_times_transposed',
  'token_sums',
}
OLMOE = (16384, 8, 2048, 1024, 64)  # T, K, D, F, E


def compile_layer(
  shape: tuple[int, ...], dtype: jnp.dtype, bias: bool = False, dump: Path | None = None
) -> Compiled:
  """Both passes of the experts of one layer, for one H200."""
  tokens, top_k, d_model, width, num_experts = shape
  mesh = Mesh(parse_topology('h200:1').devices(), ('data',))
  whole = NamedSharding(mesh, PartitionSpec())

  def array(*shape: int, dtype: jnp.dtype = dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  wide, narrow = (num_experts, d_model, width), (num_experts, width, d_model)
  wide_bias, narrow_bias = array(num_experts, width), array(num_experts, d_model)
  biases = Biases(wide_bias, wide_bias, narrow_bias) if bias else Biases()
  weights = Weights(array(*wide), array(*wide), array(*narrow), biases)
  activation = ACTIVATIONS['clamped_swiglu' if bias else 'swiglu'](7.0)

  def both(x: Array, ids: Array, w: Array, weights: Weights, dy: Array) -> tuple[Array, tuple]:
    def forward(x: Array, w: Array, weights: Weights) -> Array:
      return grouped_ffn(x, sort_copies(ids, w, num_experts), weights, activation)

    y, pull = jax.vjp(forward, x, w, weights)
    return y, pull(dy)

  x = array(tokens, d_model)
  ids, w = array(tokens, top_k, dtype=jnp.int32), array(tokens, top_k, dtype=jnp.float32)
  options = {'xla_gpu_autotune_level': 0}  # nothing can be timed
  if dump is not None:
    # The second is what JAX 0.12 wants to be told before it writes PTX.
    options |= {'xla_dump_to': str(dump), 'xla_dump_emitter_re': 'ptx'}
  with jax.set_mesh(mesh):
    return jax.jit(both).lower(x, ids, w, weights, x).compile(options)


def launches(compiled: Compiled) -> list[str]:
  """The operations that are run, one after the other; of a kernel of ours its name."""
  program = parse_program(compiled.as_text())
  names = []
  for _, instruction, _ in executed(program.computations, program.entry, 1):
    if instruction.op not in FREE:
      kernel = re.search(r'"?name"?\s*=\s*"(\w+)"', instruction.rest)
      names.append(kernel[1] if kernel else instruction.op)
  return names


@pytest.mark.parametrize(('num_experts', 'bias'), [(8, False), (256, False), (32, True)])
def test_no_loop_and_few_launches_whatever_the_number_of_experts(
  num_experts: int, bias: bool
) -> None:
  """Nine kernels of our own; the others sort, count and prepare the tiles."""
  compiled = compile_layer((4096, 2, 1024, 512, num_experts), jnp.bfloat16, bias)
  text, names = compiled.as_text(), launches(compiled)
  assert ' while(' not in text
  assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 9
  assert len(names) < 40, names


def test_temporaries_are_no_more_than_what_goes_in_and_out() -> None:
  memory = compile_layer(OLMOE, jnp.bfloat16).memory_analysis()
  outside = memory.argument_size_in_bytes + memory.output_size_in_bytes
  assert memory.temp_size_in_bytes < outside


@pytest.mark.parametrize(
  ('dtype', 'shape'),
  [
    ('bfloat16', OLMOE),
    ('bfloat16', (512, 4, 2880, 2880, 32)),  # gpt-oss: no multiple of a tile
    ('float32', (4096, 2, 1024, 512, 8)),
  ],
)
def test_machine_code_has_tensor_cores_and_spills_nothing(
  dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
  """wgmma, Hopper's product of four warps, in half precision; float32 keeps its precision."""
  compile_layer(shape, jnp.dtype(dtype), bias=shape[2] == 2880, dump=tmp_path)
  (ptxas,) = Path(importlib.util.find_spec('nvidia').submodule_search_locations[0]).rglob('ptxas')
  seen = set()
  for source in tmp_path.glob('*.ptx'):
    text = source.read_text()
    names = set(re.findall(r'\.entry (\w+?)(?:__\d+)?\(', text)) & KERNELS
    if not names:
      continue
    seen |= names
    command = [ptxas, '-v', '-arch=sm_90a', source, '-o', tmp_path / 'machine_code']
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r'(\d+) bytes spill', told)
    assert spills and {*spills} == {'0'}, (names, told)
    has_products = names != {'token_sums'} and dtype == 'bfloat16'
    assert ('wgmma.mma_async' in text) == has_products, names
  assert seen == KERNELS
