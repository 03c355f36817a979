"""Every field that decides what a training step computes is off its default in some step of the
quick certificate: a mistake that needs the field is then seen."""

from moejax.certify import tiny_config
from moejax.certify.randomness import random_config
from moejax.certify.step_metrics import metrics_config
from moejax.config.fields import is_under, walk_fields
from moejax.train.experiment.config import ExperimentConfig

CONFIGS = (
  tiny_config.base_config(),
  tiny_config.rich_config(),
  tiny_config.other_config(),
  random_config(),
  metrics_config(),
)
# What belongs to the model, the losses and how they are put together.
SECTIONS = ('model', 'balance', 'loss', 'micro_batches')
# field, or section -> where it is tried instead
ELSEWHERE = {
  'model.moe.router.selection': 'oracle, causality and decoding take every selection',
  'model.moe.router.renormalise': 'oracle has routers that do not',
  'model.moe.dispatch.exchange': 'make meshes takes every exchange',
  'model.moe.dispatch.implementation': 'large, and tests/moe/experts, take every row',
  'model.attention.latent': 'tests/model and tests/families',
  'model.attention.rope': 'tests/model and tests/families',
  'model.attention.clip_qkv': 'tests/model and tests/families',
  'model.attention.implementation': 'tests/model/test_attention_cores.py takes each',
  'model.init': 'states start with parameters of their own; tests/train/test_initial_state.py',
  'model.dtype': 'logged holds float32 against float64; bfloat16 is in tests/model',
  'model.norm_eps': 'tests/families holds it against goldens',
  'loss.task_weights': 'tests/train/step/test_objective.py',
}


def fields_off_their_default() -> set[str]:
  """The fields that have another value than `ExperimentConfig()` has, in one of the configs."""
  usual, found = dict(walk_fields(ExperimentConfig())), set()
  for cfg in CONFIGS:
    found |= {name for name, value in walk_fields(cfg) if usual.get(name) != value}
  return found


def test_every_field_of_the_step_is_tried_off_its_default() -> None:
  names = [name for name, _ in walk_fields(ExperimentConfig()) if is_under(name, SECTIONS)]
  assert len(names) > 50
  left = {name for name in names if not is_under(name, [*ELSEWHERE])} - fields_off_their_default()
  assert not left, f'set them in tiny_config.other_config(), or say where they are tried: {left}'


def test_what_is_tried_elsewhere_is_a_field_that_is_not_tried_here() -> None:
  names = [name for name, _ in walk_fields(ExperimentConfig())]
  here = fields_off_their_default()
  for section in ELSEWHERE:
    under = {name for name in names if is_under(name, [section])}
    assert under, f'{section} is no field'
    assert not under <= here, f'{section} is tried here, too'
