"""What may be changed in a config whose step does not fit."""

from moejax.plan.remedies import double_fsdp, larger_micro_batch_counts, remedy_configs
from moejax.sharding.mesh import MeshConfig
from tests.plan.eight_devices import changed


def test_remedies_are_what_the_model_and_the_batch_allow() -> None:
  assert list(remedy_configs(changed('none', data=4, fsdp=2))) == [
    '--config.model.remat=full',
    '--config.model.remat=attention',
    '--config.model.remat=dots',
    '--config.model.remat=experts',
    '--config.model.remat=all_but_attention',
    '--config.micro_batches=2',
    '--config.micro_batches=4',
    '--config.mesh.data=2 --config.mesh.fsdp=4',
  ]
  assert list(remedy_configs(changed('full', 4, data=1, fsdp=8))) == []


def test_micro_batches_become_smaller_by_whole_rows_of_a_device() -> None:
  assert larger_micro_batch_counts(changed(data=8)) == [2, 4], '32 rows, 8 at a time at least'
  assert larger_micro_batch_counts(changed(micro_batches=2, data=4)) == [4, 8]
  assert larger_micro_batch_counts(changed(micro_batches=4, data=8)) == []


def test_fsdp_doubles_on_as_many_devices() -> None:
  assert double_fsdp(MeshConfig(4, 2, 1, 1), 'data') == MeshConfig(2, 4, 1, 1)
  assert double_fsdp(MeshConfig(1, 2, 1, 4), 'tensor') == MeshConfig(1, 4, 1, 2)
