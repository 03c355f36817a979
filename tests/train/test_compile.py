"""Which rows of a batch a process reads: those of its devices, each once and in order."""

from types import SimpleNamespace

from jax.sharding import NamedSharding

from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.train.compile import rows_of_this_process


def test_one_process_reads_all_rows_on_any_mesh() -> None:
  for config in (MeshConfig(), MeshConfig(1, tensor=2, fsdp=4), MeshConfig(2, expert=2, tensor=2)):
    sharding = NamedSharding(make_mesh(config), spec('batch'))
    assert rows_of_this_process(16, sharding) == tuple(range(16))


def test_devices_of_one_process_may_hold_the_same_rows_and_lie_apart() -> None:
  slices = {'a': (slice(6, 8),), 'b': (slice(2, 4),), 'c': (slice(6, 8),)}
  sharding = SimpleNamespace(addressable_devices_indices_map=lambda shape: slices)
  assert rows_of_this_process(8, sharding) == (2, 3, 6, 7)
  everywhere = SimpleNamespace(addressable_devices_indices_map=lambda shape: {'a': (slice(None),)})
  assert rows_of_this_process(3, everywhere) == (0, 1, 2)
