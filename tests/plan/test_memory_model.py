"""The estimate of memory: of parameters it is what they take."""

from moejax.plan.memory_model import memory_by_kind, model_shapes
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import bytes_on_device
from tests.plan.eight_devices import CONFIG, CPU_8, changed


def test_guessed_parameters_are_those_of_the_mesh() -> None:
  model = model_shapes(CONFIG).model
  for cfg in (
    changed(data=8),
    changed(data=1, fsdp=8),
    changed(data=1, fsdp=2, expert=2, tensor=2),
  ):
    size = bytes_on_device(model, make_mesh(cfg.mesh))
    told = memory_by_kind(cfg, model_shapes(cfg), CPU_8)
    assert (told['parameters'], told['optimiser'], told['gradients']) == (size, 2 * size, size)
  assert memory_by_kind(changed(data=8, micro_batches=2), model_shapes(CONFIG), CPU_8)[
    'gradients'
  ] == 2 * bytes_on_device(model, make_mesh(MeshConfig())), 'the sum so far, and what is added'
