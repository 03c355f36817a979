"""The estimate of memory: of parameters it is what they take, of layers what they hold."""

import dataclasses

import pytest

from moejax.model.remat import REMAT_POLICIES
from moejax.plan.memory_model import gathered_layer_size, memory_by_kind, model_shapes
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig
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


def of_layers(**changes: object) -> ExperimentConfig:
  """CONFIG with dense layers that are as wide as three experts, and other fields of the model."""
  return dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, d_ff=384, **changes))


def test_layers_without_experts_between_are_counted_as_they_are() -> None:
  moe = dataclasses.replace(CONFIG.model.moe, num_shared=1, d_shared=36)
  for remat in REMAT_POLICIES:
    cfg = of_layers(num_dense_layers=1, ffn_pattern=('moe', 'dense'), moe=moe, remat=remat)
    shapes = model_shapes(cfg)
    told = memory_by_kind(cfg, shapes, CPU_8)
    assert told['parameters'] == bytes_on_device(shapes.model, make_mesh(cfg.mesh))
    # Of two layers of a kind twice as much is kept as of one.
    few, many, dense = (
      memory_by_kind(other, model_shapes(other), CPU_8)['activations']
      for other in (
        of_layers(num_layers=1, moe=moe, remat=remat),
        of_layers(num_layers=2, moe=moe, remat=remat),
        of_layers(num_layers=2, num_dense_layers=1, moe=moe, remat=remat),
      )
    )
    assert told['activations'] == pytest.approx(2 * dense) and many == pytest.approx(2 * few)
    assert (dense == pytest.approx(many)) == (remat in ('full', 'attention'))


def test_the_weights_gathered_are_those_of_the_largest_layer() -> None:
  """However many smaller ones there are."""
  mesh = {'data': 1, 'fsdp': 8}
  few, many = (of_layers(num_layers=layers, num_dense_layers=layers - 1) for layers in (2, 12))
  experts, with_small = (
    gathered_layer_size(dataclasses.replace(cfg, mesh=MeshConfig(**mesh)), model_shapes(cfg))
    for cfg in (few, many)
  )
  assert experts == with_small > 8 * 3 * 128 * 128
