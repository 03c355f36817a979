"""Another config than the checkpoint's is refused with both values, or accepted by name."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.config import ConfigError
from tests.checkpoint.saved_steps import DATA, State, state


def test_another_fingerprint_names_both_values_of_each_field(root: Path) -> None:
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, CheckpointConfig()).restore(
      state(), {'source': 'kjv', 'seed': '0', 'mix': 'a'}
    )
  text = str(error.value)
  assert 'data source: stdlib in the checkpoint, kjv in the config' in text
  assert 'data mix: absent in the checkpoint, a in the config' in text and 'seed' not in text


@pytest.mark.parametrize(
  ('change', 'want'),
  [
    (
      lambda s: s._replace(router=s.router.astype(jnp.bfloat16)),
      'router: float32[2, 4] in the checkpoint, bfloat16[2, 4] in the config',
    ),
    (
      lambda s: s._replace(router=s.router[:1]),
      'router: float32[2, 4] in the checkpoint, float32[1, 4]',
    ),
    (lambda s: s._replace(model={}), 'model/blocks/up: bfloat16[64, 40] in the checkpoint, absent'),
    (lambda s: (s, s.router), '1: absent in the checkpoint, float32[2, 4]'),
  ],
)
def test_another_leaf_is_refused_and_never_a_reason_to_walk_back(
  root: Path, change: Callable[[State], object], want: str
) -> None:
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, CheckpointConfig(), readonly=True).restore(change(state()), DATA)
  assert want in str(error.value) and len(error.value.problems) > 1


def test_what_may_differ_is_named_and_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
  """Another seed brings other first rows.

  Each is refused, or accepted by the name of its cause, and then logged.
  """
  mine = {
    'source': 'stdlib',
    'seed': '1',
    'first_batch': 'abc',
    'model.top_k': '2',
    'model.new': '7',
  }
  checkpoints = Checkpoints(root, CheckpointConfig(keep_latest=3))
  checkpoints.save(4, state(4), DATA | {'first_batch': 'aaa', 'model.top_k': '1', 'model.old': '7'})
  checkpoints.close()
  for accept, refused in (('', 3), ('seed', 1), ('model', 2), ('seed,data', 1), ('batch', 3)):
    with pytest.raises(ConfigError) as error:
      Checkpoints(root, CheckpointConfig(accept=accept)).restore(state(), mine)
    remedy, *lines = error.value.problems
    accepts = ','.join(sorted({*filter(None, accept.split(',')), 'model', 'seed'}))
    assert len(lines) == refused and f'--config.checkpoint.accept={accepts} ' in remedy
  assert (
    'model.top_k: 1 in the checkpoint, 2 in the config' in error.value.problems
    and not caplog.records
  )
  assert Checkpoints(root, CheckpointConfig(accept='model, seed')).restore(state(), mine)[0] == 4
  assert [r.getMessage() for r in caplog.records] == [
    'accepted: data first_batch: aaa in the checkpoint, abc in the config',
    'accepted: model.top_k: 1 in the checkpoint, 2 in the config',
    'accepted: data seed: 0 in the checkpoint, 1 in the config',
  ]


def test_another_split_is_refused_or_accepted_as_other_data(root: Path) -> None:
  """Steps of a version that had no such field, too: they may have trained on what is held out."""
  mine = DATA | {'held_out': 'abc'}
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, CheckpointConfig()).restore(state(), mine)
  remedy, *lines = error.value.problems
  assert lines == ['data held_out: absent in the checkpoint, abc in the config']
  assert '--config.checkpoint.accept=data ' in remedy
  assert Checkpoints(root, CheckpointConfig(accept='data')).restore(state(), mine)


def test_nothing_makes_up_for_another_leaf(root: Path) -> None:
  every = CheckpointConfig(accept='batch,data,model,seed,tokenizer')
  with pytest.raises(ConfigError) as error:
    Checkpoints(root, every).restore(state()._replace(router=jnp.zeros(1)), DATA | {'seed': '1'})
  assert error.value.problems[1:] == (
    'router: float32[2, 4] in the checkpoint, float32[1] in the config',
  )
  assert 'accept' not in error.value.problems[0]
