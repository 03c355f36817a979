"""cuDNN's kernel for packed documents, emulated: what it is handed, and what is made of that."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.model import cudnn_attention
from moejax.model.attention_cores import CORES, core_for
from moejax.model.cudnn_attention import document_slots, private_module, run_numbers
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.cudnn_emulator import emulate_cudnn
from tests.support.quick import QUICK

emulate_cudnn()
B, S, H, D = 4, 24, 4, 8
# Two documents and padding behind; padding in front and in between, and one token; one document,
# which the row before may have begun; a document a token.
SEGMENTS = np.array(
  [
    [1] * 9 + [2] * 12 + [0] * 3,
    [0, 0, 1, 1, 0, 2] + [3] * 18,
    [1] * 24,
    list(range(1, 25)),
  ],
  np.int32,
)
RNG = np.random.default_rng(0)


def arrays(key_heads: int, v_width: int) -> list[np.ndarray]:
  """q, k, v and the gradient to y, of which padding has none."""
  shapes = (H, D), (key_heads, D), (key_heads, v_width), (H, v_width)
  *qkv, dy = (RNG.normal(size=(B, S, *shape)).astype(np.float32) for shape in shapes)
  return [*qkv, dy * (SEGMENTS > 0)[..., None, None]]


def both(core: str, window: int, values: list[np.ndarray]) -> tuple[jax.Array, tuple]:
  """y of real tokens, and the gradients to q, k and v."""
  attend = functools.partial(
    CORES[core], segments_BS=jnp.asarray(SEGMENTS), window=window, scale=0.3, sinks=None
  )

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> tuple[jax.Array, tuple]:
    y, back = jax.vjp(jax.checkpoint(attend), q, k, v)
    return jnp.where((SEGMENTS > 0)[..., None, None], y, 0), back(dy)

  return run(*values)


# 31 runs in four rows: at 16 a row they are one call, at two a row four.
@pytest.mark.parametrize(
  ('sizes', 'documents', 'key_heads', 'v_width', 'window'),
  [
    (MeshConfig(), 16, 4, D, 0),
    (MeshConfig(), 2, 2, D, 5),
    (MeshConfig(), 2, 1, D - 3, 0),
    (MeshConfig(fsdp=2, tensor=2), 2, 2, D, 0),
  ],
  ids=['one call', 'four calls and a window', 'narrow values', 'mesh'],
)
def test_values_and_gradients_are_those_of_chunks(
  sizes: MeshConfig,
  documents: int,
  key_heads: int,
  v_width: int,
  window: int,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  values = arrays(key_heads, v_width)
  want = both('chunked', window, values)
  monkeypatch.setattr(cudnn_attention, 'DOCUMENTS', documents)
  with jax.set_mesh(make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.tensor])):
    got = both('cudnn of packed documents', window, values)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize('documents', [2, 16])
def test_slots_are_the_runs_that_numpy_counts(
  documents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(cudnn_attention, 'DOCUMENTS', documents)
  lengths, firsts = [], []
  for row, segments in enumerate(SEGMENTS):
    groups = [len([*group]) for _, group in itertools.groupby(segments)]
    lengths += groups
    firsts += [row * S + sum(groups[:i]) for i in range(len(groups))]
  slots = B * documents
  for turn in range(-(-len(lengths) // slots)):
    got = document_slots(run_numbers(jnp.asarray(SEGMENTS)), turn)
    assert got.lengths.shape == (B, documents) and got.firsts.shape == (B, documents + 1)
    here = slice(turn * slots, (turn + 1) * slots)
    empty = [0] * (slots - len(lengths[here]))
    assert got.lengths.ravel().tolist() == lengths[here] + empty
    ends = [B * S] * len(empty)
    assert got.firsts.ravel()[:slots].tolist() == firsts[here] + ends


@pytest.mark.parametrize('key_heads', [H, 2])
def test_jax_itself_miscounts_grouped_keys_before_0_11_2(key_heads: int) -> None:
  """JAX's own preparation gives cuDNN what we give it; older ones count keys in heads of q."""
  rows = SEGMENTS[:3]
  lengths, firsts = np.full((3, 16), -1, np.int32), np.full((3, 17), -1, np.int32)
  for row, segments in enumerate(rows):
    opens = np.flatnonzero(np.diff(segments, prepend=-1))
    firsts[row, : len(opens)] = opens
    lengths[row, : len(opens)] = np.diff(opens, append=S)
  q, k = jnp.zeros((3, S, H, D)), jnp.zeros((3, S, key_heads, D))
  theirs = private_module()._fix_seqlen_offsets(lengths, lengths, firsts, firsts, q, k)
  slots = document_slots(run_numbers(jnp.asarray(rows)), 0)
  ours, _ = cudnn_attention.fused_call(q, k, slots, (0, 1.0))
  is_right = [
    np.array_equal(a.ravel()[: 3 * 16 + 1], b.ravel()[: 3 * 16 + 1])
    for a, b in zip(theirs, ours[1:5], strict=True)
  ]
  counts_key_heads = key_heads == H or jax.__version_info__ >= (0, 11, 2)
  assert is_right == [True, True, True, counts_key_heads]


def test_what_the_kernels_cannot_do_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
  def core(
    width: int, *, dtype: str = 'bfloat16', length: int = 8, heads: int = 4, sinks: bool = False
  ) -> str:
    q, k = (jax.ShapeDtypeStruct((2, length, n, width), dtype) for n in (8, heads))
    return core_for('cudnn', q, k, k, has_sinks=sinks)

  for capability, of_wide, others in (
    (0.0, 'xla', 'xla'),  # no GPU, or one that cuDNN's kernels are too new for
    (8.0, 'xla', 'cudnn with a mask'),
    (9.0, 'cudnn of packed documents', 'cudnn of packed documents'),
  ):
    monkeypatch.setattr(
      private_module(),
      'check_compute_capability',
      lambda least, has=capability: has >= float(least),
    )
    assert [core(128), core(1), core(130)] == [others, others, of_wide]
    assert [core(264), core(64, dtype='float32'), core(64, length=7)] == ['xla'] * 3
    assert core(64, sinks=True) == 'chunked'
  # Rows or heads that do not divide, and more numbers than 32 bits count.
  with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])):
    assert [core(64), core(64, heads=1)] == ['cudnn of packed documents', 'cudnn with a mask']
    assert [core(64, length=2**n) for n in (22, 23)] == [
      'cudnn of packed documents',
      'cudnn with a mask',
    ]
  assert core(64, length=2**21) == 'cudnn with a mask'


def test_a_masked_call_is_of_one_width(monkeypatch: pytest.MonkeyPatch) -> None:
  """cuDNN wants one width for q, k and v, a multiple of 8, and gets it."""
  asked, real = [], jax.nn.dot_product_attention

  def fake(
    q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str, **rest: object
  ) -> jax.Array:
    asked.append((implementation, q.shape[-1], k.shape[-1], v.shape[-1]))
    return real(q, k, v, implementation='xla', **rest)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', fake)
  values = arrays(2, D + 1)
  got = both('cudnn with a mask', 0, values)
  assert set(asked) == {('cudnn', 16, 16, 16)}
  want = both('chunked', 0, values)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
