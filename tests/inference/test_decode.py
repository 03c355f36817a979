"""Decoding: caches and guesses give what running everything anew would; draws are as asked for; two programs do all."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from moejax.config import ConfigError
from moejax.data.batch import Batch
from moejax.inference import decode, sampling
from moejax.inference.decode import Drawing, draw, foremost, prefill, step
from moejax.inference.sampling import SampleConfig
from moejax.model.config import AttentionConfig, InitConfig, LatentConfig, ModelConfig
from moejax.model.rope import RopeConfig, YarnConfig
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from tests.support.quick import QUICK

V, E = 24, 4
GREEDY = SampleConfig(max_tokens=24, temperature=0.0)
# Below, at and above what prompts are rounded up to; the longest leaves no slot to padding.
PROMPTS = [[1, 2, 3], [*range(24)][::-1], [7], [5, 11, 5, 11, 5, 11, 5, 11], [3, 1]]
MOE = MoEConfig(RouterConfig(E, 2), d_expert=8)
YARN = YarnConfig(4.0, 8, mscale=0.7, mscale_all_dim=1.3)
BASE = ModelConfig(
  vocab_size=V,
  d_model=16,
  num_layers=2,
  d_ff=16,
  init=InitConfig(0.5),
  moe=MOE,
  attention=AttentionConfig(2, 1, 8),
)
# Each with what its kind of published model has.
KINDS = {
  'grouped': dataclasses.replace(BASE, mtp_depth=1, tie_embeddings=True, sandwich_norm=True),
  'windows and sinks': dataclasses.replace(
    BASE,
    num_layers=3,
    mtp_depth=3,
    attention=AttentionConfig(
      4,
      2,
      8,
      windows=(4, 0),
      sinks=True,
      qkv_bias=True,
      out_bias=True,
      rope=RopeConfig(yarn=dataclasses.replace(YARN, truncate=False)),
    ),
    moe=MoEConfig(
      RouterConfig(E, 2, weigh='softmax', logit_bias=True),
      d_expert=8,
      activation='clamped_swiglu',
      expert_bias=True,
    ),
  ),
  'latent': dataclasses.replace(
    BASE,
    num_dense_layers=1,
    mtp_depth=2,
    attention=AttentionConfig(
      2, 2, 8, RopeConfig(interleaved=True, yarn=YARN), latent=LatentConfig(6, 10, 4, 8)
    ),
    moe=MoEConfig(RouterConfig(E, 2, 'sigmoid', num_groups=2, scale=2.5), d_expert=8, num_shared=1),
  ),
  'partial rope': dataclasses.replace(
    BASE,
    num_dense_layers=1,
    mtp_depth=1,
    attention=AttentionConfig(2, 1, 8, RopeConfig(fraction=0.5), qk_norm='head', qkv_bias=True),
  ),
  'latent window': dataclasses.replace(
    BASE,
    num_layers=3,
    mtp_depth=4,
    attention=AttentionConfig(2, 2, 8, windows=(3,), latent=LatentConfig(6, 0, 4, 8)),
  ),
}
HEAVY = [
  pytest.param(kind, marks=pytest.mark.slow)
  for kind in KINDS
  if kind not in ('latent', 'windows and sinks')
]


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sampling, 'ROUND', 8)
  for name, program in PROGRAMS.items():
    monkeypatch.setattr(sampling, name, program)


PROGRAMS = {
  'prefill': jax.jit(prefill.__wrapped__, donate_argnums=3, compiler_options=QUICK),
  'step': jax.jit(step.__wrapped__, donate_argnums=2, compiler_options=QUICK),
}


@functools.cache
def model_of(cfg: ModelConfig) -> Transformer:
  """Of random numbers that follow from a parameter's name, vectors as well; large enough for texts that go on.

  The depths read the token ahead most, as the model does: they guess right at times.
  """

  def drawn(path: tuple, a: jax.ShapeDtypeStruct) -> np.ndarray:
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if 'scale' in name:
      return rng.uniform(0.7, 1.5, a.shape).astype(a.dtype)
    of = rng.normal(scale=0.3 if 'mtp' in name else 0.5, size=a.shape)
    return (of + 2 * np.eye(*a.shape[-2:]) if 'projection' in name else of).astype(a.dtype)

  return jax.tree_util.tree_map_with_path(
    drawn, jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg))
  )


def biases(cfg: ModelConfig) -> np.ndarray:
  return np.random.default_rng(1).normal(scale=0.3, size=(cfg.num_moe_layers, E)).astype(np.float32)


def decoded(
  model: Transformer,
  cfg: SampleConfig,
  prompts: Sequence[Sequence[int]] = PROMPTS,
  ends: tuple[int, ...] = (),
) -> tuple[list[list[int]], list[list[int]]]:
  """What each row says, and how many tokens each step gave each row."""
  steps = list(sampling.decode(model, biases(model.cfg), prompts, cfg, ends))
  said = [sum((new[row] for new in steps), []) for row in range(len(prompts))]
  return said, [[len(tokens) for tokens in new] for new in steps]


@functools.partial(jax.jit, compiler_options=QUICK)
def anew(model: Transformer, tokens: jax.Array, router: jax.Array) -> tuple[jax.Array, ...]:
  """The likeliest token after each, of the model and of each depth: everything at once, without a cache."""
  segments = (tokens >= 0).astype(jnp.int32)
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  batch = Batch(
    jnp.maximum(tokens, 0), tokens, segments > 0, segments, at, jnp.zeros(len(tokens), jnp.int32)
  )
  out = model(batch, router)
  return tuple(model.logits(hidden).argmax(-1) for hidden in (out.hidden, *out.mtp_hidden))


def padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
  """In the length of the longest that there may be, -1 behind."""
  return np.array([[*text, *[-1] * (64 - len(text))] for text in texts], np.int32)


@pytest.mark.parametrize(
  'kind', ['latent', pytest.param('windows and sinks', marks=pytest.mark.slow), *HEAVY]
)
def test_the_cache_decodes_what_running_anew_would(kind: str) -> None:
  """Token for token, with guesses and without, rows of all lengths, rings gone round several times."""
  cfg = KINDS[kind]
  model = model_of(cfg)
  plain, _ = decoded(model, GREEDY)
  likeliest = np.asarray(
    anew(model, padded([p + said for p, said in zip(PROMPTS, plain)]), biases(cfg))[0]
  )
  assert plain == [row[len(p) - 1 : len(p) + 23].tolist() for p, row in zip(PROMPTS, likeliest)]
  assert len({*map(tuple, plain)}) == len(PROMPTS) and len({*sum(plain, [])}) > 9, (
    'prompts and tokens that matter'
  )
  guessed, counts = decoded(model, dataclasses.replace(GREEDY, draft=True))
  assert guessed == plain
  assert {1, 2} <= {*sum(counts, [])}, 'some guesses were right and some were wrong'


@pytest.mark.parametrize(
  'kind', ['latent', *HEAVY, pytest.param('windows and sinks', marks=pytest.mark.slow)]
)
def test_guesses_are_those_of_the_text_so_far(kind: str) -> None:
  """Of every step and row: what each depth says of all known tokens and the guesses before it, without a cache."""
  cfg = KINDS[kind]
  model, router, seen = model_of(cfg), biases(cfg), []

  def spied(model: Transformer, router: np.ndarray, state: decode.Decoding, *rest: object) -> tuple:
    seen.append(np.asarray(state.chunk))
    return PROGRAMS['step'](model, router, state, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sampling, 'step', spied)
    steps = list(sampling.decode(model, router, PROMPTS, dataclasses.replace(GREEDY, draft=True)))
  texts, checked = [list(p) for p in PROMPTS], 0
  for new, chunk in zip(steps, seen):
    texts = [text + tokens for text, tokens in zip(texts, new)]
    going = [
      row for row, text in enumerate(texts) if new[row] and len(text) < len(PROMPTS[row]) + 24
    ]
    likeliest = anew(
      model, padded([text + chunk[row, 1:].tolist() for row, text in enumerate(texts)]), router
    )
    for row in going:
      assert chunk[row, 0] == texts[row][-1]
      want = [int(of[row, len(texts[row]) - 2]) for of in likeliest[1:]]
      assert chunk[row, 1:].tolist() == want
      checked += 1
  assert checked > 50


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'sizes'),
  [
    ('windows and sinks', MeshConfig(data=1, fsdp=2, expert=2, tensor=2)),
    ('latent', MeshConfig(data=8)),
  ],
  ids=str,
)
def test_a_mesh_changes_nothing(kind: str, sizes: MeshConfig) -> None:
  """Five rows on four devices or eight; there, too, all steps are one program."""
  cfg = KINDS[kind]
  want, _ = decoded(model_of(cfg), GREEDY)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    there = jax.tree.map(jax.device_put, model_of(cfg), shardings(model_of(cfg), mesh))
    before = PROGRAMS['step']._cache_size()
    assert decoded(there, dataclasses.replace(GREEDY, draft=True))[0] == want
    assert PROGRAMS['step']._cache_size() == before + 1


@pytest.mark.parametrize(
  'kind', [pytest.param('windows and sinks', marks=pytest.mark.slow), 'latent']
)
def test_a_step_leaves_what_it_was_given(kind: str) -> None:
  """In bfloat16, too: the same shapes and dtypes from prefill and step, or the second step would be compiled anew."""
  cfg = dataclasses.replace(KINDS[kind], dtype='bfloat16')
  model, starts = (
    jax.eval_shape(lambda: Transformer(jax.random.key(0), cfg)),
    jnp.zeros(2, jnp.int32),
  )
  drawing = Drawing(jax.random.key(0), *map(jnp.asarray, (1.0, 0, 0.9)))
  for depths in (0, min(cfg.mtp_depth, decode.MOST_GUESSES)):

    def both(
      model: Transformer, router: np.ndarray, depths: int = depths
    ) -> tuple[decode.Decoding, decode.Decoding]:
      caches = empty_caches(2, 32, cfg, depths)
      state, _ = prefill(model, router, np.ones((2, 16), np.int32), caches, starts, drawing)
      return state, step(model, router, state, starts == 0, drawing)[0]

    given, left = jax.eval_shape(both, model, biases(cfg))
    assert given == left and given.chunk.shape == (2, 1 + depths)
    assert given.caches['blocks'][0].entries[0].dtype == given.hidden.dtype == jnp.bfloat16


def test_rows_that_have_ended_are_padding_and_stay() -> None:
  cfg = KINDS['latent']
  model, router, starts = model_of(cfg), biases(cfg), jnp.arange(5)
  drawing = Drawing(jax.random.key(0), *map(jnp.asarray, (0.0, 0, 1.0)))
  prompts, caches = np.ones((5, 24), np.int32), empty_caches(5, 56, cfg, 2)
  state, _ = PROGRAMS['prefill'](model, router, prompts, caches, starts, drawing)
  alive = np.array([True, False, True, True, False])
  state, _, counts = PROGRAMS['step'](model, router, state, alive, drawing)
  for cache in (cache for turn in state.caches.values() for cache in turn):
    np.testing.assert_array_equal(
      cache.length, np.broadcast_to(24 + np.where(alive, counts, 0), cache.length.shape)
    )
    np.testing.assert_array_equal(
      cache.segments[:, :, 24], np.broadcast_to(alive, cache.segments.shape[:2])
    )


def certain(depth: int) -> Transformer:
  """A model whose next token follows from the last one alone, and depths that know how: all branches give 0."""
  cfg = dataclasses.replace(BASE, mtp_depth=depth)
  model = jax.tree.map(lambda a: jnp.asarray(a), model_of(cfg))
  for block in (model.blocks, model.mtp.block):
    block.attention.out.w[...] *= 0
    block.moe.experts.down[...] *= 0
  for norm in (model.norm, model.mtp.norm, model.mtp.token_norm):
    norm.scale[...] = 0 * norm.scale[...] + 1
  model.mtp.projection.w[...] = jnp.broadcast_to(jnp.eye(32, 16), model.mtp.projection.w.shape)
  return model


@pytest.mark.slow
@pytest.mark.parametrize('depth', [2, 4])
def test_a_model_that_knows_what_it_will_say_says_it_at_once(depth: int) -> None:
  """As many tokens a step as there are depths, and one; where one depth is wrong, only as many as are before it."""
  model = certain(depth)
  ask = SampleConfig(
    1 + 4 * (depth + 1), temperature=0.0, draft=True
  )  # 13 tokens of depth 2: as the next tests
  said, counts = decoded(model, ask)
  assert counts == [[1] * len(PROMPTS)] + [[depth + 1] * len(PROMPTS)] * 4
  assert said == decoded(model, dataclasses.replace(ask, draft=False))[0]
  model.mtp.norm.scale[...] = model.mtp.norm.scale[...].at[-1].multiply(-1)
  wrong, counts = decoded(model, ask)
  assert wrong == said and {*sum(counts[1:-1], [])} == {depth}


def test_draws_are_the_same_with_guesses_and_whatever_the_other_rows_are() -> None:
  model, ask = certain(2), SampleConfig(16, 1.0, 5, 0.9, seed=3)
  said, _ = decoded(model, ask)
  guessed, counts = decoded(model, dataclasses.replace(ask, draft=True))
  assert guessed == said and {1, 2, 3} <= {*sum(counts, [])}
  others = [[9] * 24, *PROMPTS[1:3], [4], [2] * 9]
  assert decoded(model, ask, others)[0][1:3] == said[1:3]
  assert decoded(model, dataclasses.replace(ask, seed=4))[0][0] != said[0]
  again = decoded(model, ask, [PROMPTS[1]] * 5)[0]
  assert again[1] == said[1] and len({*map(tuple, again)}) == 5, 'rows are drawn one by one'


@pytest.mark.parametrize('draft', [False, True])
def test_a_row_ends_by_itself(draft: bool) -> None:
  """With an end, which is the last it says, or after max_tokens, in the middle of a step or not; others go on."""
  model = certain(2)
  ask = dataclasses.replace(GREEDY, max_tokens=13, draft=draft)
  said, _ = decoded(model, ask)
  end = next(token for token in said[0][1:5] if any(token not in other for other in said[1:]))
  ended, counts = decoded(model, ask, ends=(end,))
  want = [row[: row.index(end) + 1] if end in row else row for row in said]
  assert ended == want and len({*map(len, want)}) > 1 and max(map(len, want)) == 13
  assert all(
    new == 0
    for row, text in enumerate(want)
    for new in [
      counts[i][row] for i in range(len(counts)) if sum(c[row] for c in counts[:i]) >= len(text)
    ]
  )
  assert decoded(model, ask, [PROMPTS[2], *PROMPTS[1:2] * 4], (end,))[0][:2] == [want[2], want[1]]


def test_nearby_lengths_and_other_settings_share_two_programs() -> None:
  """One for the prompt and one for all tokens after it; nothing else is compiled either."""
  compiled: list[str] = []

  def listen(name: str, seconds: float, **about: str | int) -> None:
    if 'backend_compile' in name:
      compiled.append(name)

  model = certain(2)

  def run(prompts: list[list[int]], cfg: SampleConfig) -> list[int]:
    before = [program._cache_size() for program in PROGRAMS.values()]
    decoded(model, cfg, prompts)
    return [program._cache_size() - size for program, size in zip(PROGRAMS.values(), before)]

  monitoring.register_event_duration_secs_listener(listen)
  try:
    assert run(PROMPTS[2:4], SampleConfig(50, 0.5, 0, 0.9, 0, draft=True)) == [1, 1]
    assert compiled, 'the event has another name by now'
    compiled.clear()
    assert run([[1], [2, 3]], SampleConfig(50, 0.0, 3, 1.0, 1, draft=True)) == [0, 0]
    assert run([[1, 2], [3] * 5], SampleConfig(49, 0.8, 7, 0.5, 2, ('x',), draft=True)) == [0, 0]
    assert not compiled
  finally:
    monitoring.unregister_event_duration_listener(listen)


def test_there_is_room_for_guesses_beyond_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
  """A step that begins before the last token writes a chunk, and its last depth as many slots again less two."""
  asked: list[int] = []

  def spied(batch: int, length: int, cfg: ModelConfig, depths: int) -> None:
    asked.append(length - (24 + max_tokens + 2 * depths - 2))
    raise StopIteration

  monkeypatch.setattr(sampling, 'empty_caches', spied)
  for max_tokens in range(1, 20):
    with pytest.raises(RuntimeError, match='StopIteration'):
      decoded(certain(3), SampleConfig(max_tokens, draft=True))
  assert min(asked) >= 0 and max(asked) < 10 and len(asked) == 19


@pytest.mark.parametrize(
  ('cfg', 'told'),
  [
    (BASE, 'mtp_depth=0: use draft=False'),
    (
      dataclasses.replace(
        BASE, mtp_depth=1, moe=MoEConfig(RouterConfig(E, 2, selection='expert_choice'), d_expert=8)
      ),
      "selection='expert_choice'",
    ),
  ],
  ids=['one token', 'not causal'],
)
def test_guesses_are_refused_where_there_are_none_or_they_would_matter(
  cfg: ModelConfig, told: str
) -> None:
  with pytest.raises(ConfigError, match=told):
    sampling.guesses(cfg, SampleConfig(draft=True))
  assert sampling.guesses(cfg, SampleConfig()) == 0


PROBABILITIES = np.array([0.5, 0.3, 0.15, 0.05])
drawn = jax.jit(draw, compiler_options=QUICK)


def counted(
  logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> np.ndarray:
  """How often each token comes, of 4000 draws."""
  drawing = Drawing(jax.random.key(0), *map(jnp.asarray, (temperature, top_k, top_p)))
  tokens = drawn(
    np.tile(logits.astype(np.float32), (4, 1000, 1)), np.tile(np.arange(1000), (4, 1)), drawing
  )
  return np.bincount(np.asarray(tokens).ravel(), minlength=len(logits)) / 4000


@pytest.mark.parametrize(
  ('settings', 'kept'),
  [
    *(
      ({'top_p': p}, kept)
      for p, kept in ((1.0, 4), (0.96, 4), (0.9, 3), (0.79, 2), (0.49, 1), (0.3, 1), (1e-6, 1))
    ),
    *(({'top_k': k}, kept) for k, kept in ((0, 4), (1, 1), (2, 2), (3, 3), (4, 4), (9, 4))),
    ({'top_k': 3, 'top_p': 0.8}, 2),
    ({'top_k': 2, 'top_p': 0.62}, 1),
    ({'top_k': 2, 'top_p': 0.63}, 2),
  ],
  ids=str,
)
def test_draws_are_from_the_likeliest_alone(settings: dict[str, float], kept: int) -> None:
  """top_p is of what top_k leaves: of two, the first has 0.625. The likeliest need not come first."""
  order = np.array([2, 0, 3, 1])
  probs, logits = np.zeros(4), np.empty(4)
  probs[order[:kept]] = PROBABILITIES[:kept] / PROBABILITIES[:kept].sum()
  logits[order] = np.log(PROBABILITIES)
  found = counted(logits, **settings)
  np.testing.assert_allclose(found, probs, atol=0.03)
  assert ((found > 0) == (probs > 0)).all()


@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_temperature_flattens_or_sharpens(temperature: float) -> None:
  want = PROBABILITIES ** (1 / temperature)
  np.testing.assert_allclose(
    counted(np.log(PROBABILITIES), temperature), want / want.sum(), atol=0.03
  )
  # At temperature 2 the likeliest has 0.38 only: a nucleus of 0.5 holds two.
  assert (counted(np.log(PROBABILITIES), 2.0, top_p=0.5) > 0).sum() == 2
  assert (counted(np.log(PROBABILITIES), 0.0, top_k=4, top_p=0.5) == [1, 0, 0, 0]).all()


@pytest.mark.parametrize('spread', [1e-3, 1.0, 100.0])
def test_the_foremost_are_those_that_a_sort_would_find(spread: float) -> None:
  """Signs, zeros, infinities and ties, for a count and for a mass."""
  rng = np.random.default_rng(0)
  x = (spread * rng.normal(size=(6, 1000))).astype(np.float32)
  x[1, ::3], x[2, 1::2], x[3] = 0.0, -np.inf, np.abs(x[3])
  x[4] = np.round(x[4]) + 0.0  # no -0, which is less than 0 here
  x[5] = rng.permutation(1000).astype(np.float32) * np.float32(2.0**-23) + 1  # neighbours
  probs = np.asarray(jax.nn.softmax(x))
  for weights, amounts in ((np.ones_like(x), (1, 7, 400, 1000)), (probs, (1e-3, 0.3, 0.9, 0.999))):
    for amount in amounts:
      got = np.asarray(foremost(x, weights, amount, True))
      for row in range(len(x)):
        order = np.argsort(-x[row], kind='stable')
        reached = np.searchsorted(
          np.cumsum(weights[row][order].astype(np.float64)), amount * (1 - 1e-6)
        )
        least = x[row][order[min(reached, 999)]]
        np.testing.assert_array_equal(got[row], x[row] >= least, err_msg=f'{row=} {amount=}')
