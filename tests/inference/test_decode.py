"""Decoding: caches and drafts give what running everything anew would, by two programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data.batch import make_batch
from moejax.inference import decode, sampling
from moejax.inference.decode import prefill, step
from moejax.inference.sampling import (
  SampleConfig,
)
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.dispatch.dispatchers import DROP_BY, DispatchConfig
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from tests.inference.decode_cases import (
  BASE,
  GREEDY,
  KINDS,
  MOE,
  PROMPTS,
  SOME_OR_ALL,
  anew,
  biases,
  certain,
  decode_all,
  model_of,
  pad,
  sampling_params,
)
from tests.support.quick import QUICK
from tests.support.unoptimised import DECODING


@pytest.mark.parametrize('kind', SOME_OR_ALL)
def test_the_cache_decodes_what_running_anew_would(kind: str) -> None:
  """Token for token, with drafts and without, rows of all lengths, rings gone round often."""
  cfg = KINDS[kind]
  model = model_of(cfg)
  plain, _ = decode_all(model, GREEDY)
  texts = [p + said for p, said in zip(PROMPTS, plain)]
  likeliest = np.asarray(anew(model, pad(texts), biases(cfg))[0])
  assert plain == [row[len(p) - 1 : len(p) + 23].tolist() for p, row in zip(PROMPTS, likeliest)]
  # Prompts and tokens matter.
  assert len({*map(tuple, plain)}) == len(PROMPTS) and len({*sum(plain, [])}) > 9
  guessed, counts = decode_all(model, dataclasses.replace(GREEDY, draft=True))
  assert guessed == plain
  assert {1, 2} <= {*sum(counts, [])}, 'some guesses were right and some were wrong'


# Hash selection drafts by the ids of the tokens ahead, which training does not: other guesses.
@pytest.mark.parametrize(
  'kind', [kind for kind in SOME_OR_ALL if kind == 'uniform' or kind.values != ('hash',)]
)
def test_guesses_are_those_of_the_text_so_far(kind: str) -> None:
  """Of every step and row: what each depth says of all known tokens and the drafts before it.

  The depths have no cache then.
  """
  cfg = KINDS[kind]
  model, router, seen = model_of(cfg), biases(cfg), []

  def spied(model: Transformer, router: np.ndarray, state: decode.Decoding, *rest: object) -> tuple:
    seen.append(np.asarray(state.chunk))
    return DECODING['step'](model, router, state, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, 'step', spied)
    steps = list(sampling.decode(model, router, PROMPTS, dataclasses.replace(GREEDY, draft=True)))
  texts, checked = [list(p) for p in PROMPTS], 0
  for new, chunk in zip(steps, seen):
    texts = [text + tokens for text, tokens in zip(texts, new)]
    going = [
      row for row, text in enumerate(texts) if new[row] and len(text) < len(PROMPTS[row]) + 24
    ]
    drafted = [text + chunk[row, 1:].tolist() for row, text in enumerate(texts)]
    likeliest = anew(model, pad(drafted), router)
    for row in going:
      assert chunk[row, 0] == texts[row][-1]
      want = [int(tokens[row, len(texts[row]) - 2]) for tokens in likeliest[1:]]
      assert chunk[row, 1:].tolist() == want
      checked += 1
  assert checked > 50


@pytest.mark.slow
def test_a_mesh_changes_nothing() -> None:
  """Five rows on eight devices, in fours; there, too, all steps are one program."""
  cfg = KINDS['latent']
  want, _ = decode_all(model_of(cfg), GREEDY)
  mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
  with jax.set_mesh(mesh):
    there = jax.tree.map(jax.device_put, model_of(cfg), shardings(model_of(cfg), mesh))
    before = DECODING['step']._cache_size()
    assert decode_all(there, dataclasses.replace(GREEDY, draft=True))[0] == want
    assert DECODING['step']._cache_size() == before + 1


@pytest.mark.parametrize(
  'kind', [pytest.param('windows and sinks', marks=pytest.mark.slow), 'latent']
)
def test_a_step_leaves_what_it_was_given(kind: str) -> None:
  """In bfloat16, too: the same shapes and dtypes from prefill and step.

  Otherwise the second step would be compiled anew.
  """
  cfg = dataclasses.replace(KINDS[kind], dtype='bfloat16')
  model = jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg))
  starts = jnp.zeros(2, jnp.int32)
  params = sampling_params(1.0, 0, 0.9)
  for depths in (0, min(cfg.mtp_depth, decode.MAX_DRAFTS)):

    def both(
      model: Transformer, router: np.ndarray, depths: int = depths
    ) -> tuple[decode.Decoding, decode.Decoding]:
      caches = empty_caches(2, 32, cfg, depths)
      state, _ = prefill(model, router, np.ones((2, 16), np.int32), caches, starts, params)
      return state, step(model, router, state, starts == 0, params)[0]

    given, left = jax.eval_shape(both, model, biases(cfg))
    assert given == left and given.chunk.shape == (2, 1 + depths)
    assert given.caches['layers'][0].entries[0].dtype == given.hidden.dtype == jnp.bfloat16


@pytest.mark.slow
def test_rows_that_have_ended_are_padding_and_stay() -> None:
  cfg = KINDS['latent']
  model, router, starts = model_of(cfg), biases(cfg), jnp.arange(5)
  params = sampling_params(0.0, 0, 1.0)
  prompts, caches = np.ones((5, 24), np.int32), empty_caches(5, 56, cfg, 2)
  state, _ = DECODING['prefill'](model, router, prompts, caches, starts, params)
  alive = np.array([True, False, True, True, False])
  state, _, counts = DECODING['step'](model, router, state, alive, params)
  lengths = 24 + np.where(alive, counts, 0)
  for cache in (cache for turn in state.caches.values() for cache in turn):
    np.testing.assert_array_equal(cache.length, np.broadcast_to(lengths, cache.length.shape))
    # A window's cache is a ring, whose places are used again.
    segments = cache.segments[:, :, 24 % cache.segments.shape[-1]]
    np.testing.assert_array_equal(segments, np.broadcast_to(alive, segments.shape))


@pytest.mark.slow
def test_a_model_that_knows_what_it_will_say_says_it_at_once() -> None:
  """As many tokens a step as there are depths, and one.

  Where one depth is wrong, only as many as are before it.
  """
  depth = 2
  model = certain(depth)
  # 13 tokens of depth 2: as other tests.
  ask = SampleConfig(1 + 4 * (depth + 1), temperature=0.0, draft=True)
  said, counts = decode_all(model, ask)
  assert counts == [[1] * len(PROMPTS)] + [[depth + 1] * len(PROMPTS)] * 4
  assert said == decode_all(model, dataclasses.replace(ask, draft=False))[0]
  model.mtp.norm.scale[...] = model.mtp.norm.scale[...].at[-1].multiply(-1)
  wrong, counts = decode_all(model, ask)
  assert wrong == said and {*sum(counts[1:-1], [])} == {depth}


@pytest.mark.slow
@pytest.mark.parametrize('drop_by', DROP_BY)
def test_rows_do_not_change_each_other_whatever_capacity_training_had(drop_by: str) -> None:
  """In training they would: full experts drop copies of other rows, and of other places."""
  tight = DispatchConfig('dense_matmul', 0.5, drop_by)
  cfg = dataclasses.replace(BASE, mtp_depth=1, moe=dataclasses.replace(MOE, dispatch=tight))
  model, dropless = model_of(cfg), model_of(dataclasses.replace(cfg, moe=MOE))
  prompts = [PROMPTS[0]] * 4
  ask = dataclasses.replace(GREEDY, max_tokens=8)
  alike, _ = decode_all(model, ask, prompts)
  assert alike == [alike[0]] * 4 == decode_all(dropless, ask, prompts)[0]
  # Drafts are verified by a model that is causal.
  assert sampling.drafts_per_step(cfg, dataclasses.replace(ask, draft=True)) == 1
  notes = [sampling.decoding_note(c.cfg) for c in (model, dropless)]
  assert 'capacity_factor=0.5' in notes[0] and not notes[1]
  batch = make_batch(np.array(prompts))
  trained = jax.jit(lambda: model(batch, biases(cfg), whole={}).hidden, compiler_options=QUICK)()
  assert np.abs(trained - trained[:1]).max() > 0.1
