"""Cross entropy against the oracle, however it is cut, and that it never holds all the logits."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax.config import ConfigError, frozendict
from moejax.model.cross_entropy import (
  LossConfig,
  PerToken,
  cross_entropy,
  join_chunks,
  split_chunks,
)
from moejax.plan.hlo.memory_traffic import executed
from moejax.plan.hlo.program import parse_program
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support import oracle

B, S, D, V = 2, 12, 6, 10
IGNORED = [(0, 3), (1, 0), (1, 11)]
RNG = np.random.default_rng(0)
H = RNG.normal(size=(B, S, D)).astype(np.float32)
HEAD = RNG.normal(size=(D, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, (B, S)).astype(np.int32)
for at in IGNORED:
  TARGETS[at] = oracle.IGNORE
WEIGHTS = (TARGETS != oracle.IGNORE) / np.float32(B * S - len(IGNORED))
# One, some, one a token, and numbers that do not divide 12.
CUTS = [1, 4, 12, 5, 8]
Z = 0.1


@functools.partial(jax.jit, static_argnums=5)
def run(
  h: jax.Array,
  head: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  z_coef: jax.Array,
  chunks: int,
) -> tuple[jax.Array, PerToken, tuple[jax.Array, jax.Array]]:
  """The loss, its parts, and its gradients to h and head.

  The coefficient is traced, as that of a schedule is.
  """

  def loss(h: jax.Array, head: jax.Array) -> tuple[jax.Array, PerToken]:
    return cross_entropy(h, head, targets, weights, z_coef, chunks)

  (total, parts), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(h, head)
  return total, parts, gradients


def want(h: np.ndarray, head: np.ndarray, z_coef: float) -> float:
  nll, z, tokens = oracle.cross_entropy(h @ head, TARGETS, z_coef)
  return (nll + z) / tokens


@pytest.mark.parametrize('z_coef', [0.0, Z])
def test_value_and_gradients_are_the_oracles(z_coef: float) -> None:
  h, head = H.astype(np.float64), HEAD.astype(np.float64)
  total, _, (dh, d_head) = run(H, HEAD, TARGETS, WEIGHTS, z_coef, 4)
  np.testing.assert_allclose(total, want(h, head, z_coef), rtol=1e-6)
  alone, _ = jax.jit(cross_entropy, static_argnums=5)(H, HEAD, TARGETS, WEIGHTS, z_coef, 4)
  np.testing.assert_allclose(
    alone, total, rtol=1e-6, err_msg='another value where nothing is differentiated'
  )
  np.testing.assert_allclose(
    dh, oracle.finite_difference(lambda a: want(a, head, z_coef), h), rtol=1e-4, atol=1e-7
  )
  np.testing.assert_allclose(
    d_head, oracle.finite_difference(lambda a: want(h, a, z_coef), head), rtol=1e-4, atol=1e-7
  )
  assert not any(dh[at].any() for at in IGNORED), 'nothing is to be predicted there'


@pytest.mark.parametrize('chunks', CUTS[1:])
def test_the_number_of_chunks_changes_nothing(chunks: int) -> None:
  one, other = (jax.tree.leaves(run(H, HEAD, TARGETS, WEIGHTS, Z, n)) for n in (CUTS[0], chunks))
  for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_parts_are_each_tokens_own_and_add_up() -> None:
  total, parts, _ = run(H, HEAD, TARGETS, WEIGHTS, Z, 4)
  logits = H.astype(np.float64) @ HEAD
  for t in np.ndindex(TARGETS.shape):
    norm = oracle.logsumexp(logits[t])
    np.testing.assert_allclose(parts.log_z[t], norm, rtol=1e-5)
    if t not in IGNORED:
      np.testing.assert_allclose(parts.nll[t], norm - logits[t][TARGETS[t]], rtol=1e-5)
  assert np.isfinite(parts.nll).all(), 'weight 0 times something finite is 0'
  np.testing.assert_allclose((WEIGHTS * (parts.nll + Z * parts.log_z**2)).sum(), total, rtol=1e-6)


def test_parts_carry_no_gradient() -> None:
  def loss(h: jax.Array, share: float) -> jax.Array:
    total, parts = cross_entropy(h, HEAD, TARGETS, WEIGHTS, Z, 4)
    return total + share * (parts.nll.sum() + parts.log_z.sum())

  differentiate = jax.jit(jax.grad(loss))
  np.testing.assert_array_equal(differentiate(H, 0.0), differentiate(H, 100.0))


def test_gradient_scales_with_the_cotangent() -> None:
  def loss(h: jax.Array, head: jax.Array, scale: float) -> jax.Array:
    return scale * cross_entropy(h, head, TARGETS, WEIGHTS, Z, 4)[0]

  differentiate = jax.jit(jax.grad(loss, (0, 1)))
  for one, three in zip(differentiate(H, HEAD, 1.0), differentiate(H, HEAD, 3.0)):
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_bfloat16_rounds_the_factors_of_the_product_only() -> None:
  """Logits and all after them are float32: the loss is the oracle's, of the rounded h and head."""
  h, head = (a.astype(jnp.bfloat16) for a in (H, HEAD))
  total, parts, (dh, d_head) = run(h, HEAD, TARGETS, WEIGHTS, Z, 4)
  assert dh.dtype == jnp.bfloat16
  assert {a.dtype for a in (total, d_head, *parts)} == {jnp.dtype('float32')}
  h64, head64 = h.astype(np.float64), head.astype(np.float64)
  np.testing.assert_allclose(total, want(h64, head64, Z), rtol=1e-6)
  _, _, (dh32, d_head32) = run(H, HEAD, TARGETS, WEIGHTS, Z, 4)
  for rounded, full in ((dh, dh32), (d_head, d_head32)):
    near = 0.03 * float(jnp.abs(full).max())
    np.testing.assert_allclose(rounded.astype(jnp.float32), full, atol=near)


def test_large_logits_and_a_batch_without_targets() -> None:
  total, parts, gradients = run(1e4 * H, HEAD, TARGETS, WEIGHTS, 0.0, 4)
  assert all(np.isfinite(a).all() for a in (total, *parts, *gradients))
  nothing = np.full_like(TARGETS, oracle.IGNORE)
  total, parts, gradients = run(H, HEAD, nothing, np.zeros_like(WEIGHTS), Z, 4)
  assert total == 0 and not any(a.any() for a in gradients) and np.isfinite(parts.nll).all()


def biggest_array(h: tuple[int, ...], vocab: int, chunks: int, dtype: str) -> int:
  """Numbers in the biggest array of the compiled program that makes the loss and its gradients."""
  shapes = (
    jax.ShapeDtypeStruct(h, dtype),
    jax.ShapeDtypeStruct((h[-1], vocab), 'float32'),
    jax.ShapeDtypeStruct(h[:2], 'int32'),
    jax.ShapeDtypeStruct(h[:2], 'float32'),
  )
  program = run.lower(*shapes, jnp.float32(Z), chunks).compile().as_text()
  arrays = re.findall(r'\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]', program)
  assert len(arrays) > 20, program
  return max(math.prod(map(int, dims.split(','))) for dims in arrays)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_no_array_of_the_program_holds_the_logits_of_all_tokens(dtype: str) -> None:
  shape, vocab = (2, 16, 8), 256
  logits = shape[0] * shape[1] * vocab
  # In one chunk they are there, and can be seen.
  assert biggest_array(shape, vocab, 1, dtype) == logits
  assert biggest_array(shape, vocab, 4, dtype) <= max(logits // 4, shape[2] * vocab)


def test_split_and_join() -> None:
  parts = split_chunks((H, TARGETS), 4)
  assert [a.shape for a in parts] == [(4, B, 3, D), (4, B, 3)]
  np.testing.assert_array_equal(parts[0][1], H[:, 3:6])
  for a, b in zip(join_chunks(parts, S), (H, TARGETS)):
    np.testing.assert_array_equal(a, b)
  # Pieces are never longer than asked for, and the last one is filled up, whatever the length.
  assert [split_chunks(H, n).shape[::2] for n in CUTS] == [(1, 12), (4, 3), (12, 1), (4, 3), (6, 2)]
  for length in (1, 2, 127, 254, 257, 8191):
    for chunks in (1, 3, 4, 16):
      row = jax.ShapeDtypeStruct((1, length), 'int32')
      number, _, size = jax.eval_shape(functools.partial(split_chunks, chunks=chunks), row).shape
      assert number <= chunks and size == math.ceil(length / chunks)
      assert number * size < length + size, 'no piece is empty'
  pieces = split_chunks(TARGETS[:, :7], 4)
  assert not pieces[3, :, 1].any(), 'filled with zeros'
  np.testing.assert_array_equal(join_chunks(pieces, 7), TARGETS[:, :7])


@pytest.mark.parametrize('length', [1, 2, 127, 254, 257])
def test_every_length_is_the_oracles_in_any_number_of_chunks(length: int) -> None:
  """Value and both gradients against float64 of the row at once: softmax - target, by hand."""
  rng = np.random.default_rng(length)
  h, head = rng.normal(size=(1, length, 3)), rng.normal(size=(3, 5))
  targets = rng.integers(0, 5, (1, length)).astype(np.int32)
  weights = rng.uniform(0, 1, (1, length)) / length
  logits = h @ head
  log_z = np.log(np.exp(logits).sum(-1))
  nll = log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
  p = np.exp(logits - log_z[..., None])
  d_logits = p * (1 + 2 * Z * log_z[..., None]) - np.eye(5)[targets]
  d_logits *= weights[..., None]
  arrays = [a.astype(np.float32) for a in (h, head)]
  for chunks in (4, 1000):
    total, parts, (dh, d_head) = run(*arrays, targets, weights.astype(np.float32), Z, chunks)
    np.testing.assert_allclose(total, (weights * (nll + Z * log_z**2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(parts.nll, nll, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dh, d_logits @ head.T, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(d_head, np.einsum('bsd,bsv->dv', h, d_logits), rtol=1e-4, atol=1e-6)


def test_weights_of_tasks_weigh_value_and_gradient_token_by_token() -> None:
  """Weight 0 is a token that is not there; else a row counts for what its weight says."""
  _, parts, (plain, _) = run(H, HEAD, TARGETS, WEIGHTS, Z, 4)
  each = (WEIGHTS * (parts.nll + Z * parts.log_z**2)).sum(1)
  for weights in ([0.0, 3.0], [0.5, 2.0]):
    of_rows = np.array(weights, np.float32)[:, None]
    total, _, (dh, _) = run(H, HEAD, TARGETS, WEIGHTS * of_rows, Z, 4)
    np.testing.assert_allclose(total, (of_rows[:, 0] * each).sum(), rtol=1e-6)
    np.testing.assert_allclose(dh, of_rows[..., None] * plain, rtol=1e-5, atol=1e-8)


def test_a_config_that_cannot_be_is_one_clear_error() -> None:
  with pytest.raises(ConfigError) as error:
    weights = frozendict(code=-1.0, prose=float('nan'), poems=float('inf'), all=0.0)
    LossConfig('-1', 'much', weights, chunks=0)
  assert [problem.split(':')[0] for problem in error.value.problems] == [
    "z_coef='-1' is not a schedule",
    "mtp_coef='much' is not a schedule",
    'task_weights.code=-1.0',
    'task_weights.prose=nan',
    'task_weights.poems=inf',
    'chunks=0',
  ]
  for problem in error.value.problems:
    assert ': use ' in problem, problem


def test_coefficients_are_numbers_or_schedules() -> None:
  for good in ('0', '1e-4', '1e-4, 0@50%', '0.1, 0.2@10%'):
    LossConfig(z_coef=good, mtp_coef=good)


def test_the_head_is_gathered_once_and_its_gradient_reduced_once() -> None:
  """Not for every chunk: by what a compiled program runs on eight devices, over `fsdp`."""
  mesh = make_mesh(MeshConfig(1, fsdp=8))
  by_rows, split = NamedSharding(mesh, spec('batch')), NamedSharding(mesh, spec('embed', 'vocab'))
  rows, width, vocab = 8, 16, 24
  per_token = (rows, S)
  shapes = (
    jax.ShapeDtypeStruct((*per_token, width), jnp.float32, sharding=by_rows),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32, sharding=split),
    jax.ShapeDtypeStruct(per_token, jnp.int32, sharding=by_rows),
    jax.ShapeDtypeStruct(per_token, jnp.float32, sharding=by_rows),
    jax.ShapeDtypeStruct((), jnp.float32),
  )
  with jax.set_mesh(mesh):
    program = parse_program(run.lower(*shapes, 4).compile().as_text())
  times: Counter[str] = Counter()
  for _, instruction, count in executed(program.computations, program.entry, 1):
    moves = instruction.op.startswith('all-gather') or 'reduce' in instruction.op
    if moves and f'[{width},{vocab}]' in re.sub(r'\[(1,)+', '[', instruction.shape):
      times[instruction.op] += count
  assert times['all-gather'] == 1 and times['all-reduce'] + times['reduce-scatter'] == 1, times
