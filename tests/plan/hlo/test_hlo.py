"""What is read from a compiled program: collectives as they were written, bytes as by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import PartitionSpec as P

from moejax.model.cudnn_attention import SELDOM
from moejax.plan.hlo.collectives import Collective, collectives, sent_bytes, walk
from moejax.plan.hlo.memory_traffic import traffic
from moejax.plan.hlo.program import array_bytes, parse_program
from moejax.plan.hlo.replica_groups import axes_of, groups_of
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.quick import QUICK

SIZES = {'data': 2, 'fsdp': 2, 'expert': 2, 'tensor': 1}
ROWS = P(('data', 'fsdp', 'expert'))


def compiled(f: Callable[[Array], Array], shape: tuple[int, ...]) -> str:
  """Text of `f` on each device's own part of an array, on 2 x 2 x 2 devices."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  with jax.set_mesh(mesh):
    step = jax.jit(jax.shard_map(f, in_specs=ROWS, out_specs=ROWS, check_vma=False))
    return step.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile(QUICK).as_text()


def test_collectives_of_a_program_are_those_that_it_was_made_of() -> None:
  """Eight rows of 16 numbers are 512 bytes; loops of five turns in one of three."""

  def f(x: Array) -> Array:  # [8, 16] on each device
    def inner(x: Array, _: None) -> tuple[Array, None]:
      return jax.lax.psum(x, 'fsdp') * 0.1, None

    def outer(x: Array, _: None) -> tuple[Array, None]:
      x, _ = jax.lax.scan(inner, x, None, length=5)
      return jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)]), None

    x, _ = jax.lax.scan(outer, x, None, length=3)
    x = jax.lax.all_gather(x, 'expert', axis=0, tiled=True)  # [16, 16]
    x = jax.lax.all_to_all(jnp.sin(x), ('data', 'expert'), split_axis=0, concat_axis=0, tiled=True)
    return jax.lax.psum_scatter(x, ('data', 'fsdp', 'expert'), scatter_dimension=0, tiled=True)

  found = collectives(compiled(f, (64, 16)), SIZES)
  expected = {
    Collective('all-reduce', ('fsdp',), 15, 15 * 2 * 512 / 2),
    Collective('collective-permute', ('data',), 3, 3 * 512),
    Collective('all-gather', ('expert',), 1, 1024 / 2),
    Collective('all-to-all', ('data', 'expert'), 1, 1024 * 3 / 4),
    Collective('reduce-scatter', ('data', 'fsdp', 'expert'), 1, 1024 * 7 / 8),
  }
  assert set(found) == expected
  assert [c.bytes for c in found] == sorted((c.bytes for c in expected), reverse=True)


@pytest.mark.parametrize(
  ('text', 'axes', 'size'),
  [
    ('replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add', ('fsdp',), 2),
    ('replica_groups=[4,2]<=[8], dimensions={0}', ('expert',), 2),
    ('replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}', ('data',), 2),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', ('data', 'fsdp'), 4),
    ('replica_groups=[1,8]<=[8]', ('data', 'fsdp', 'expert'), 8),
    (
      "replica_groups=mesh['data'=2,'fsdp'=2,'expert'=2,'tensor'=1] {'data','expert'}, x",
      ('data', 'expert'),
      4,
    ),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ('data', 'fsdp'), 4),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", ('fsdp',), 2),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ('expert',), 2),
    ('source_target_pairs={{0,4},{4,0},{1,5},{5,1}}', ('data',), 2),
    ('replica_groups={}, to_apply=%add', ('data', 'fsdp', 'expert'), 8),
  ],
)
def test_groups_of_devices_are_mesh_axes(text: str, axes: tuple[str, ...], size: int) -> None:
  groups = groups_of(text, 8)
  assert axes_of(groups, SIZES) == axes and groups.shape[1] == size
  assert axes_of(np.array([[0, 1]]), SIZES) == ('expert',), 'a part of the groups is enough'


ASYNC = """HloModule x

%cond (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %n = s32[] constant(58)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.3 (a: bf16[64,8]) -> bf16[8,8] {
  %a = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%a), \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%body (q: (s32[])) -> (s32[]) {
  %q = (s32[], bf16[64,8]{1,0}) parameter(0)
  %g = bf16[64,8]{1,0} get-tuple-element(%q), index=1
  %s = (bf16[64,8]{1,0}, bf16[128,8]{1,0}) all-gather-start(%g), \
replica_groups=[4,2]<=[8], dimensions={0}
  %d = bf16[128,8]{1,0} all-gather-done(%s)
  %f = bf16[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %room = bf16[999,8]{1,0} broadcast(%z), dimensions={}
  %r = bf16[999,8]{1,0} ragged-all-to-all(%g, %room, %o, %o, %o, %o), replica_groups=[4,2]<=[8]
  ROOT %t = (s32[], bf16[64,8]{1,0}) tuple(%i, %g)
}

ENTRY %main (x: bf16[64,8]) -> bf16[64,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %w = (s32[], bf16[64,8]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %y = bf16[64,8]{1,0} get-tuple-element(%w), index=1
}
"""


def test_a_tpus_way_of_writing() -> None:
  """What a program for TPUs has that one for the CPU has not.

  The trip count is not noted, starts are apart from ends, a reduce-scatter is written as an
  all-reduce, and there is room for more rows than are sent.
  """
  found = {c.kind: c for c in collectives(ASYNC, SIZES)}
  size = 64 * 8 * 2
  assert found == {
    'all-gather': Collective('all-gather', ('expert',), 58, 58 * 2 * size / 2),
    'reduce-scatter': Collective(
      'reduce-scatter', ('data', 'fsdp', 'expert'), 58, 58 * size * 7 / 8
    ),
    'ragged-all-to-all': Collective('ragged-all-to-all', ('expert',), 58, 58 * size / 2),
  }
  computations, entry = parse_program(ASYNC)
  _, first, _ = next(walk(computations, entry))
  permute = first._replace(
    op='collective-permute-start', shape='(f32[8]{0}, f32[8]{0}, u32[]{:S(2)}, u32[]{:S(2)})'
  )
  assert sent_bytes('collective-permute', permute, 2, []) == 32


def test_a_loop_that_seldom_turns_does_nothing() -> None:
  seldom = ASYNC.replace('body=%body', f'body=%body, metadata={{op_name="jit(f)/{SELDOM}/while"}}')
  counts = [[c.count for c in collectives(text, SIZES)] for text in (ASYNC, seldom)]
  assert counts == [[58] * 3, [0] * 3]


def test_the_bytes_of_a_shape_are_those_of_each_array_in_it() -> None:
  assert array_bytes('(bf16[64,8]{1,0:T(8,128)(2,1)}, s4[3], pred[], f8e4m3fn[2,2])') == [
    1024,
    1.5,
    1,
    4,
  ]
  assert array_bytes('token[]') == [0]


def test_bytes_through_memory() -> None:
  """Ten turns of a loop each take one matrix and update one row: neither array is read whole."""

  def f(w: Array, x: Array) -> Array:
    def turn(
      carry: tuple[Array, Array], each: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
      (x, kept), (w, i) = carry, each
      x = x @ w
      return (x, kept.at[i].set(x[0])), None

    return jax.lax.scan(turn, (x, jnp.zeros((10, 64))), (w, jnp.arange(10)))[0][1]

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((10, 64, 64), (64, 64))]
  text = jax.jit(f).lower(*shapes).compile(QUICK).as_text()
  matrix = 64 * 64 * 4
  assert 10 * 5 * matrix < traffic(text) < 10 * 8 * matrix, (
    'two for a slice, three for a product; some are copied'
  )


SCATTER = """HloModule y

%into (a: bf16[1000,8], i: s32[4,1], u: bf16[4,8]) -> bf16[1000,8] {
  %a = bf16[1000,8]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %u = bf16[4,8]{1,0} parameter(2)
  ROOT %s = bf16[1000,8]{1,0} scatter(%a, %i, %u), to_apply=%add
}

ENTRY %main (x: bf16[1000,8], j: s32[4,1], v: bf16[4,8]) -> bf16[1000,8] {
  %x = bf16[1000,8]{1,0} parameter(0)
  %j = s32[4,1]{1,0} parameter(1)
  %v = bf16[4,8]{1,0} parameter(2)
  %chip = bf16[4,8]{1,0:S(1)} copy(%v)
  ROOT %f = bf16[1000,8]{1,0} fusion(%x, %j, %v), kind=kInput, calls=%into
}
"""


def test_what_is_updated_in_place_is_not_read_and_written_whole() -> None:
  """The rows that are added, their places, the rows that are written; a copy stays on the chip."""
  rows, places = 4 * 8 * 2, 4 * 4
  assert traffic(SCATTER) == rows + places + rows + rows


IN_PLACE = """HloModule z

%turn (a: f32[10,64], i: s32[], w: f32[10,64]) -> f32[640] {
  %a = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %w = f32[10,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %flat = f32[640]{0} bitcast(%a)
  %again = f32[10,64]{1,0} bitcast(%flat)
  %row = f32[1,64]{1,0} dynamic-slice(%again, %i, %zero), dynamic_slice_sizes={1,64}
  %other = f32[1,64]{1,0} dynamic-slice(%w, %i, %zero), dynamic_slice_sizes={1,64}
  %sum = f32[1,64]{1,0} add(%row, %other)
  %new = f32[10,64]{1,0} dynamic-update-slice(%a, %sum, %i, %zero)
  ROOT %out = f32[640]{0} bitcast(%new)
}

ENTRY %main (x: f32[10,64], j: s32[], v: f32[10,64]) -> f32[640] {
  %x = f32[10,64]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %v = f32[10,64]{1,0} parameter(2)
  ROOT %f = f32[640]{0} fusion(%x, %j, %v), kind=kLoop, calls=%turn
}
"""


def test_a_row_that_is_read_and_updated_through_bitcasts_counts_as_a_row() -> None:
  """A row of each array is read, and one is written; beside them the index."""
  assert traffic(IN_PLACE) == 3 * 64 * 4 + 4
  reads_all = IN_PLACE.replace('add(%row, %other)', 'reduce(%again, %zero), to_apply=%add')
  assert traffic(reads_all) == (640 + 2 * 64) * 4 + 4
