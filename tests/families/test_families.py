"""Families as data: presets against published configs, parameter counts, and that presets run."""

import json

import jax
import numpy as np
import pytest

from moejax.data.batch import Batch
from moejax.families import FAMILIES, config_json, model_config
from moejax.families.schema.family import KEPT
from moejax.model.transformer import Transformer
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters
from tests.families.tiny_configs import TINY
from tests.support.published_configs import FIGURES, PUBLISHED

PRESETS = [(kind, preset) for kind, known in FAMILIES.items() for preset in known.presets]
IDS = {
  keys: [f'{kind}-{preset}' for kind, preset in rows]
  for keys, rows in (('presets', PRESETS), ('published', PUBLISHED), ('figures', FIGURES))
}
# Published keys that say nothing of what the weights compute, beside KEPT.
INERT = {
  'initial_context_length',
  'pretraining_tp',
  'quantization_config',
  'torch_dtype',
  'use_cache',
}


@pytest.mark.parametrize(('kind', 'preset'), PUBLISHED, ids=IDS['published'])
def test_the_preset_is_the_published_config(kind: str, preset: str) -> None:
  known, published = FAMILIES[kind], PUBLISHED[kind, preset]
  cfg = known.presets[preset]
  assert model_config(published) == (known, cfg)
  written = config_json(known, cfg, {})
  slides = written.get('use_sliding_window', True)
  off = set() if slides else {'sliding_window', 'max_window_layers'}
  for name, value in published.items():
    name = known.aliases[name] if name in known.aliases else name
    if name == 'rope_scaling' and value:
      kinds = {'type': 'yarn', 'rope_type': 'yarn'}
      assert written[name] == value | kinds
    elif name in written and name not in off:
      assert written[name] == value, (name, written[name], value)
      assert type(written[name]) in (type(value), float), (name, written[name], value)
    else:
      assert name in KEPT | INERT | off, f'{name}={value!r} is not read'


def test_every_published_preset_is_compared() -> None:
  presets = {(kind, preset) for kind, preset in PRESETS if preset != 'tiny'}
  assert set(PUBLISHED) == presets == set(FIGURES)
  assert all(next(iter(known.presets)) == 'full' for known in FAMILIES.values())


@pytest.mark.parametrize(('kind', 'preset'), PRESETS, ids=IDS['presets'])
def test_a_preset_comes_back_from_its_config_json(kind: str, preset: str) -> None:
  cfg = FAMILIES[kind].presets[preset]
  written = config_json(FAMILIES[kind], cfg, {'bos_token_id': 5, 'max_position_embeddings': 99})
  assert written['bos_token_id'] == 5 and written['model_type'] == kind
  known, back = model_config(json.loads(json.dumps(written)))
  assert back == cfg and config_json(known, back, {}) == config_json(known, cfg, {})


@pytest.mark.parametrize(('kind', 'preset'), FIGURES, ids=IDS['figures'])
def test_parameters_are_as_many_as_published(kind: str, preset: str) -> None:
  cfg = FAMILIES[kind].presets[preset]
  model = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
  count = count_parameters(model, ExperimentConfig(model=cfg))
  less = {'all': 0, 'embed': count.embedding, 'both': 2 * count.embedding}
  total, total_counts, active, active_counts = FIGURES[kind, preset]
  own = count.total - count.mtp * ('mtp' not in total_counts)
  own -= less[total_counts.removesuffix('+mtp')]
  for ours, theirs in ((own, total), (count.active - less[active_counts], active)):
    digits = len(str(theirs).partition('.')[2])
    assert abs(ours / 1e9 - theirs) <= 0.51 * 10**-digits, (ours / 1e9, theirs)


@pytest.mark.slow
@pytest.mark.parametrize('kind', FAMILIES)
def test_the_tiny_preset_runs(kind: str) -> None:
  """Traced only: what it computes is held against goldens elsewhere."""
  cfg = TINY[kind]
  row = jax.ShapeDtypeStruct((2, 12), np.int32)

  def run(key: jax.Array, *fields: jax.Array) -> jax.Array:
    model, batch = Transformer(key, cfg), Batch(*fields)
    bias = np.zeros((cfg.num_moe_layers, cfg.moe.router.num_experts))
    return model.logits(model(batch, bias).hidden)

  logits = jax.eval_shape(run, jax.random.key(0), *[row] * len(Batch._fields))
  assert logits.shape == (2, 12, cfg.vocab_size)
