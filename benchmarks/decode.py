"""How fast is decoding: all anew for each token, with a cache, and with guesses checked at once?

  python -m benchmarks.decode [--rounds=9 --tokens=48 --prompt=512 --rows=1 --train=90] [--quick]

One model of 12 layers, with grouped-query or latent attention, in float32. Guesses are by one block
of multi-token prediction: of random weights, which are never right; of weights after --train
seconds on the standard library's sources; and of weights made so that every guess is right, at the
same cost. The likeliest token is taken, and with guesses the text is the same. The rows of the
table take turns, once a round; printed are the median and its range.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.table import Table

from moejax.data.batch import make_batch
from moejax.data.pipeline import Data, open_data
from moejax.data.sources import DataConfig
from moejax.inference.sampling import SampleConfig, decode
from moejax.model.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.model.transformer import Transformer, empty_caches
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig
from moejax.train.step.train_state import init_state
from moejax.train.step.train_step import compile_step

GROUPED = AttentionConfig(num_heads=8, num_kv_heads=2, d_head=32)
LATENT = AttentionConfig(
  num_heads=8, num_kv_heads=8, d_head=32, latent=LatentConfig(64, 128, 16, 32)
)
MODEL = ModelConfig(
  vocab_size=4096,
  d_model=256,
  num_layers=12,
  attention=LATENT,
  mtp_depth=1,
  moe=MoEConfig(RouterConfig(8, 2), d_expert=256),
)
# What `--quick` decodes with, and trains on.
SMALLEST = {'rounds': 1, 'tokens': 4, 'prompt': 16, 'rows': 1, 'train': 0}
SMALL_MODEL = dataclasses.replace(MODEL, vocab_size=257, d_model=32, num_layers=1)
SMALL_TEXT = DataConfig(source='synthetic', tokenizer='bytes', synthetic_tokens=20_000)
Prompts = list[list[int]]
Run = Callable[[], Iterator[list[list[int]]]]  # decodes prompts: what each step adds to each row


def config(attention: AttentionConfig, quick: bool) -> ExperimentConfig:
  """The config that trains the model with this attention."""
  data = SMALL_TEXT if quick else DataConfig(tokenizer='bytes')
  model = SMALL_MODEL if quick else MODEL
  return ExperimentConfig(
    steps=400,
    batch_size=8,
    seq_len=128,
    data=data,
    balance=BalanceConfig(bias_rule='sign'),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=20),
    model=dataclasses.replace(model, attention=attention),
  )


def trained(cfg: ExperimentConfig, data: Data, seconds: float) -> tuple[Transformer, Array, int]:
  """Model and router bias after so long, and the steps that were made in it."""
  state, steps = jax.jit(functools.partial(init_state, cfg))(), 0
  if seconds:
    step = compile_step(cfg, state, data.batch(0))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
      state, metrics = step(state, data.batch(steps))
      jax.block_until_ready(metrics)
      steps += 1
  return state.model, state.router.bias, steps


def foreseeing(model: Transformer) -> Transformer:
  """The same shapes, but each token follows from the one before alone, and the guesser knows how:
  blocks add 0."""
  model = jax.tree.map(lambda a: a, model)
  for block in (model.blocks, model.mtp.block):
    block.attention.out.w[...] = 0 * block.attention.out.w[...]
    block.moe.experts.down[...] = 0 * block.moe.experts.down[...]
  model.mtp.token_norm.scale[...] = jnp.ones_like(model.mtp.token_norm.scale[...])
  model.mtp.norm.scale[...] = model.norm.scale[...][None]
  model.mtp.projection.w[...] = jnp.eye(*model.mtp.projection.w.shape[1:])[None]
  return model


@jax.jit
def likeliest(model: Transformer, router: Array, tokens: Array, length: Array) -> Array:
  """The next token of rows of `length` tokens, all computed anew: [B, S] padded behind -> [B]."""
  at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  segments = (at < length).astype(jnp.int32)
  hidden = model(make_batch(tokens, segment_ids=segments), router).hidden
  return model.logits(hidden[:, length - 1][:, None])[:, 0].argmax(-1)


def anew(
  model: Transformer, router: Array, prompts: Prompts, tokens: int
) -> Iterator[list[list[int]]]:
  """Decoding without a cache; the prompts are of one length."""
  length = len(prompts[0])
  rows = np.pad(np.array(prompts, np.int32), ((0, 0), (0, tokens)))
  for at in range(length, length + tokens):
    rows[:, at] = likeliest(model, router, rows, at)
    yield rows[:, at : at + 1].tolist()


def timed(run: Run) -> tuple[float, float, float]:
  """Seconds to the first token, tokens/s after it, of all rows together, and tokens a step of one
  row."""
  start, times, counts = time.perf_counter(), [], []
  for new in run():
    times.append(time.perf_counter())
    counts.append(len(sum(new, [])))
    rows = len(new)
  later = sum(counts[1:])
  return times[0] - start, later / (times[-1] - times[0]), later / len(counts[1:]) / rows


def cache_bytes(model: ModelConfig) -> int:
  """The bytes that one more token takes in the caches of one row, of all layers."""
  caches = jax.eval_shape(lambda: empty_caches(1, 1024, model))
  arrays = [array for turn in caches.values() for cache in turn for array in cache.entries]
  return sum(array.size * array.dtype.itemsize for array in arrays) // 1024


def first_text(run: Run) -> list[int]:
  """The tokens of the first row."""
  return sum((new[0] for new in run()), [])


def contenders(args: argparse.Namespace) -> tuple[dict[str, tuple[Run, int]], int]:
  """name -> how it decodes, and its cache's bytes a token; and the steps of training."""
  cfg = config(LATENT, args.quick)
  data = open_data(cfg.data, batch_size=cfg.batch_size, seq_len=cfg.seq_len, seed=0)
  text = next(iter(data.validation(1))).tokens.ravel().tolist()
  prompts = [text[i : i + args.prompt] for i in range(args.rows)]
  grouped = config(GROUPED, args.quick)
  random_grouped = trained(grouped, data, 0)[:2]
  model, router, _ = trained(cfg, data, 0)
  *after, steps = trained(cfg, data, args.train)

  def cached(model: Transformer, router: Array, draft: bool = False) -> Run:
    sampling = SampleConfig(args.tokens, 0.0, draft=draft)
    return functools.partial(decode, model, router, prompts, sampling)

  plain, guessed = (first_text(cached(*after, draft)) for draft in (False, True))
  if plain != guessed:
    raise SystemExit('with guesses the text is another one')
  few, size = max(3, args.tokens // 8), cache_bytes(cfg.model)
  return {
    'latent, everything anew': (functools.partial(anew, model, router, prompts, few), 0),
    'grouped-query, cache': (cached(*random_grouped), cache_bytes(grouped.model)),
    'latent, cache': (cached(model, router), size),
    '  + guesses, never right': (cached(model, router, True), size),
    f'  + guesses, after {args.train:.0f} s of training': (cached(*after, True), size),
    '  + guesses, always right': (cached(foreseeing(model), router, True), size),
  }, steps


def main() -> None:
  """Trains, races, prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  for name, default in (('rounds', 9), ('tokens', 48), ('prompt', 512), ('rows', 1), ('train', 90)):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args, console = parser.parse_args(), Console(width=150)
  if args.quick:
    vars(args).update(SMALLEST)
  runs, steps = contenders(args)
  results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
  for i in range(args.rounds + 1):  # the first one compiles
    for name, (run, _) in runs.items():
      result = timed(run)
      if i:
        results[name].append(result)
  base = statistics.median(rate for _, rate, _ in results['latent, cache'])
  columns = [
    'decoding',
    'tokens/s: median (least - most)',
    'over the cache alone',
    'tokens a step',
    'cache, bytes a token',
    'prefill, tokens/s',
  ]
  table = Table(*columns)
  for name, (_, size) in runs.items():
    firsts, rates, per_step = zip(*results[name])
    row = [
      name,
      f'{statistics.median(rates):.1f} ({min(rates):.1f} - {max(rates):.1f})',
      f'{statistics.median(rates) / base:.2f}',
      f'{statistics.median(per_step):.2f}',
      f'{size or "-"}',
      f'{args.rows * args.prompt / statistics.median(firsts):.0f}',
    ]
    table.add_row(*row)
  task = f'{args.rows} row(s), a prompt of {args.prompt} tokens and {args.tokens} more'
  backend = f'JAX {jax.__version__}, {jax.default_backend()}'
  console.print(f'{task}, {args.rounds} rounds; trained for {steps} steps; {backend}')
  console.print(table)


if __name__ == '__main__':
  main()
