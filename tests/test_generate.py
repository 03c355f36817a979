"""The command prints what the model of a run says, and errors with a status of their own."""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.config import frozendict
from moejax.data.batch import make_batch
from moejax.data.sources import DataConfig
from moejax.data.tokenizer import Tokenizer, load_tokenizer
from moejax.generate import main
from moejax.inference import sampling
from moejax.inference.sampling import SampleConfig, sample
from moejax.model.config import AttentionConfig, InitConfig, ModelConfig
from moejax.model.transformer import Transformer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import ExperimentConfig, with_vocabulary
from moejax.train.experiment.run_dir import CHECKPOINTS, TOKENIZER_FILE, open_run, write_config
from moejax.train.step.train_state import TrainState, init_state
from tests.support.quick import QUICK
from tests.support.unoptimised import DECODING

TOKENIZER = load_tokenizer('bytes')
EOD = TOKENIZER.eod_id
# Losses over more rows than are sampled, a rule with momentum, noise: none of it may change a text
# or stop it.
CONFIG = ExperimentConfig(
  data=DataConfig(tokenizer='bytes'),
  balance=BalanceConfig(frozendict(global_batch='0.1'), bias_rule='smebu'),
  model=ModelConfig(
    d_model=16,
    num_layers=2,
    num_dense_layers=1,
    d_ff=16,
    init=InitConfig(0.5),
    mtp_depth=1,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, d_head=8),
    moe=MoEConfig(RouterConfig(4, 2, noisy=True, jitter=0.3), d_expert=8),
  ),
)
PROMPT = 'hello world'


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(sampling, 'ROUND', 8)
  for name, program in DECODING.items():
    monkeypatch.setattr(sampling, name, program)


@pytest.fixture(scope='module')
def state() -> TrainState:
  """Not trained, but with a bias that decides something."""
  cfg = with_vocabulary(CONFIG, TOKENIZER.vocab_size)
  made = jax.jit(functools.partial(init_state, cfg), compiler_options=QUICK)()
  return made._replace(
    router=made.router._replace(bias=jnp.array([[0.1, -0.1, 0.05, 0.0], [0.0] * 4]))
  )


@pytest.fixture(scope='module')
def run_directory(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of one checkpoint, at step 7."""
  path = tmp_path_factory.mktemp('run')
  write_config(ExperimentConfig(**{**vars(CONFIG), 'workdir': str(path)}))
  TOKENIZER.save(path / TOKENIZER_FILE)
  writer = Checkpoints(path / CHECKPOINTS, CheckpointConfig())
  writer.save(7, state, {})
  writer.close()
  return path


@functools.partial(jax.jit, compiler_options=QUICK)
def last_logits(
  model: Transformer, router: jax.Array, tokens: jax.Array, length: jax.Array
) -> jax.Array:
  """Logits [V] of the last of `length` tokens, by a model without a cache.

  tokens: [1, T], padded behind, so that all lengths are one program.
  """
  positions = jnp.arange(tokens.shape[1])[None]
  segments = (positions < length).astype(jnp.int32)
  batch = make_batch(tokens, segment_ids=segments, positions=positions)
  return model.logits(model(batch, router).hidden)[0, length - 1]


def anew(state: TrainState, prompt: Sequence[int], count: int) -> list[int]:
  """The likeliest continuation, everything computed again for each token."""
  ids = list(prompt)
  for _ in range(count):
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    ids.append(int(last_logits(state.model, state.router.bias, tokens, len(ids)).argmax()))
  return ids[len(prompt) :]


def test_the_same_seed_is_the_same_text_and_another_seed_another(state: TrainState) -> None:
  def said(seed: int) -> str:
    return ''.join(
      sample(state.model, state.router.bias, TOKENIZER, PROMPT, SampleConfig(10, 2.0, 0, 1.0, seed))
    )

  texts = [said(seed) for seed in (0, 0, 1, 2)]
  assert texts[0] == texts[1] and len({*texts}) == 3


def test_a_run_comes_back_as_it_was_saved(run_directory: Path, state: TrainState) -> None:
  cfg, tokenizer, step, model, router = open_run(str(run_directory))
  assert step == 7 and cfg.model.vocab_size == tokenizer.vocab_size == TOKENIZER.vocab_size
  assert isinstance(tokenizer, Tokenizer) and tokenizer.digest == TOKENIZER.digest
  np.testing.assert_array_equal(router, state.router.bias)
  jax.tree.map(np.testing.assert_array_equal, model, state.model)


@pytest.mark.parametrize(
  'more',
  [
    [],
    ['--top_k=1', '--temperature=2', '--top_p=1'],
    pytest.param(['--draft'], marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_the_command_prints_prompt_and_continuation(
  more: list[str], run_directory: Path, state: TrainState, capsys: pytest.CaptureFixture
) -> None:
  before = sorted(p.stat().st_mtime_ns for p in run_directory.rglob('*'))
  command = [
    f'--workdir={run_directory}',
    f'--prompt={PROMPT}',
    '--max_tokens=10',
    '--temperature=0',
    *more,
  ]
  assert main(command) == 0
  out, err = capsys.readouterr()
  want = TOKENIZER.decode(anew(state, [EOD, *PROMPT.encode()], 10))
  assert out == PROMPT + want + '\n' and len(want) > 2
  assert f'step 7 of {run_directory}' in err and '10 tokens, ' in err and ' tokens/s' in err
  assert ('tokens a step' in err) == ('--draft' in more)
  after = sorted(p.stat().st_mtime_ns for p in run_directory.rglob('*'))
  assert after == before, 'a reader writes nothing'
  assert main([*command, f'--stop={want[2:4]}', '--stop=never']) == 0
  assert capsys.readouterr().out == PROMPT + want[: want.index(want[2:4])] + '\n'


def test_a_run_without_a_tokenizer_goes_on_from_ids(
  run_directory: Path, state: TrainState, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  ids = [EOD, *PROMPT.encode()]
  want = anew(state, ids, 10)
  shown = ','.join(map(str, ids))
  command = [
    f'--workdir={run_directory}',
    f'--prompt_ids={shown}',
    '--max_tokens=10',
    '--temperature=0',
  ]
  assert main(command) == 0
  assert capsys.readouterr().out == ','.join(map(str, ids + want)) + '\n'
  bare = shutil.copytree(run_directory, tmp_path / 'bare')
  (bare / TOKENIZER_FILE).unlink()
  whole = dataclasses.replace(
    CONFIG, workdir=str(bare), model=with_vocabulary(CONFIG, TOKENIZER.vocab_size).model
  )
  command[0] = f'--workdir={bare}'
  assert main(command) == 2 and 'model.vocab_size=0' in capsys.readouterr().err
  write_config(whole)
  assert main([*command, f'--stop={want[3]}']) == 0
  assert capsys.readouterr().out == ','.join(map(str, ids + want[: want.index(want[3])])) + '\n'
  for wrong in ('--prompt_ids=1,300', '--prompt_ids=1,a', '--stop=-1'):
    assert main([*command, wrong]) == 2 and 'is not a token id, 0 to 256' in capsys.readouterr().err
  assert main([command[0], '--prompt=a']) == 2 and 'give --prompt_ids' in capsys.readouterr().err


def test_a_model_that_cannot_guess_is_told_so(
  run_directory: Path,
  tmp_path: Path,
  capsys: pytest.CaptureFixture,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(sampling, 'causality', lambda moe: ['no: it looks ahead'])
  assert main([f'--workdir={run_directory}', '--draft']) == 2
  assert 'not causal: no: it looks ahead' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('argument', 'told'),
  [
    ('--temperature=-1', 'temperature=-1.0: use 0'),
    ('--temperature=nan', 'temperature=nan: use a finite number'),
    ('--top_p=0', 'top_p=0.0: use a number above 0'),
    ('--top_p=1.1', 'top_p=1.1: use'),
    ('--max_tokens=0', 'max_tokens=0: use 1 or more'),
    ('--top_k=-1', 'top_k=-1: use 0'),
    ('--stop=', "stop='': use"),
    ('--seed=-1', 'seed=-1: use 0 or more'),
    ('--seed=4294967296', 'seed=4294967296: use 4294967295 at most'),
    ('--top_k=4294967296', 'top_k=4294967296: use 2147483647 at most'),
    ('--prompt=ab\udcff', "--prompt='ab\\udcff' is not UTF-8: give text in UTF-8"),
    ('--stop=\udcff', "--stop='\\udcff' is not UTF-8"),
  ],
)
def test_a_bad_value_is_status_2_and_one_line(
  argument: str, told: str, capsys: pytest.CaptureFixture
) -> None:
  assert main(['--workdir=nowhere', argument]) == 2
  out, err = capsys.readouterr()
  assert err.startswith('moejax.generate: ' + told) and err.count('\n') == 1 and not out


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ([], '--workdir'),
    (['--workdir=x', '--max_tokens=some'], "invalid int value: 'some'"),
    (['--workdir=x', '--tempature=1'], '--tempature=1'),
    (['--workdir=x', 'max_tokens=9'], 'max_tokens=9'),
  ],
)
def test_what_cannot_be_parsed_is_status_2(
  arguments: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
  with pytest.raises(SystemExit) as stop:
    main(arguments)
  assert stop.value.code == 2 and told in capsys.readouterr().err


def test_a_directory_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  """Status 2 where there is no run, 3 where it has saved nothing yet; a reader leaves no trace."""
  assert main([f'--workdir={tmp_path}']) == 2
  error = capsys.readouterr().err
  assert f"workdir='{tmp_path}' holds no config.json: name the directory of a run" in error
  assert not list(tmp_path.iterdir())
  write_config(ExperimentConfig(**{**vars(CONFIG), 'workdir': str(tmp_path)}))
  assert main([f'--workdir={tmp_path}']) == 2
  assert TOKENIZER_FILE in capsys.readouterr().err
  TOKENIZER.save(tmp_path / TOKENIZER_FILE)
  assert main([f'--workdir={tmp_path}']) == 3
  assert 'has no checkpoint yet: train it first' in capsys.readouterr().err
  assert not (tmp_path / CHECKPOINTS).exists()


def test_a_run_whose_checkpoint_is_damaged_is_status_3(
  run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  (tmp_path / CHECKPOINTS / '7' / 'meta').mkdir(parents=True)
  for name in ('config.json', TOKENIZER_FILE):
    (tmp_path / name).write_bytes((run_directory / name).read_bytes())
  assert main([f'--workdir={tmp_path}']) == 3
  assert 'none of [7] loads' in capsys.readouterr().err
