"""moejax against the goldens of public implementations: `make families` prints the table.

  tests/golden/NAME -> our model -> logits, weights, gradients, AdamW steps, greedy text -> worst deviation

Deviations are absolute for logits and weights, and relative for the rest: |a - b| / |b| as vectors, of each parameter.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from moejax.certify.report import rewrite
from moejax.config import frozendict
from moejax.data.batch import IGNORE, Batch
from moejax.families.schema.tensor_names import to_file
from moejax.hf import weights as transfer
from moejax.inference.sampling import SampleConfig, decode
from moejax.model.config import ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.transformer import Transformer
from moejax.moe import layer as moe_layer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.routing import Routing
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig
from moejax.train.step.objective import targets_ahead
from moejax.train.step.train_state import init_state
from moejax.train.step.train_step import train_step
from tests.support.quick import QUICK

GOLDEN = Path(__file__).parents[1] / 'golden'
NAMES = sorted(path.parent.name for path in GOLDEN.glob('*/about.json'))
CASES = ('', 'left_', 'right_')
STEPS = 6
Tree = dict[str, np.ndarray]
T = TypeVar('T')


class Golden(NamedTuple):
  """A checkpoint as ours, and how its tensors are spelt."""

  directory: Path
  about: dict
  cfg: ModelConfig
  model: Transformer  # NumPy
  router: np.ndarray  # [L, E] f32
  made_of: dict  # path of a leaf -> the tensors of the file that it is made of

  def recorded(self, name: str) -> Tree:
    return dict(np.load(self.directory / f'{name}.npz'))

  @property
  def routes(self) -> bool:
    """A dense model has no choice of experts to compare."""
    return self.cfg.moe.router.num_experts > 1


def load(name: str) -> Golden:
  """The golden checkpoint as an import reads it."""
  source = transfer.open_published(GOLDEN / name)
  model, router = jax.device_get(
    transfer.read_weights(source, make_mesh(MeshConfig(), jax.devices()[:1]), lambda nbytes: None)
  )
  about = json.loads((source.directory / 'about.json').read_text())
  return Golden(source.directory, about, source.cfg, model, router, source.made_of)


def published(golden: Golden, tree: Transformer) -> Tree:
  """Leaves in the model's structure, under the names and in the layout of the file."""
  paths = [path for path in golden.made_of if path != 'router.bias']
  parts: dict[str, dict[str, np.ndarray]] = {}
  for path, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
    for tensor in golden.made_of[path]:
      parts.setdefault(tensor.name, {})[tensor.how] = np.asarray(leaf)[tensor.index]
  return {name: to_file(halves) for name, halves in parts.items()}


def batch_of(recorded: Tree, cases: tuple[str, ...]) -> Batch:
  """The recorded rows of some cases, one under another, as training would see them."""
  tokens, mask = (
    np.concatenate([recorded[case + key] for case in cases]) for key in ('tokens', 'mask')
  )
  pairs = np.pad(mask[:, :-1] * mask[:, 1:], [(0, 0), (0, 1)]) > 0
  targets = np.where(pairs, np.roll(tokens, -1, axis=1), IGNORE)
  positions = np.maximum(mask.cumsum(1) - 1, 0)
  return Batch(
    *(a.astype(np.int32) for a in (tokens, targets)),
    targets != IGNORE,
    *(a.astype(np.int32) for a in (mask, positions)),
    np.zeros(len(tokens), np.int32),
  )


def mean_nll(model: Transformer, hidden: jax.Array, batch: Batch, rows: int) -> jax.Array:
  """The mean cross entropy of the first `rows` rows, from all logits."""
  logits, targets, mask = model.logits(hidden[:rows]), batch.targets[:rows], batch.mask[:rows]
  likely = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
  return jnp.where(mask, jax.nn.logsumexp(logits, -1) - likely, 0).sum() / mask.sum()


class Forward(NamedTuple):
  """What one pass over some rows gives."""

  logits: jax.Array  # [B, S, V]
  mtp_logits: list[jax.Array]  # of each depth, [B, S, V]
  loss: jax.Array  # cross entropy of the first rows, and the mean of that of all depths
  gradient: Transformer


@functools.partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def forward(model: Transformer, router: jax.Array, batch: Batch, rows: int) -> Forward:
  """The loss is of the first `rows` rows only."""

  def loss(model: Transformer) -> tuple[jax.Array, tuple]:
    out = model(batch, router)
    deeper = [
      mean_nll(model, h, targets_ahead(batch, depth), rows)
      for depth, h in enumerate(out.mtp_hidden, 1)
    ]
    total = mean_nll(model, out.hidden, batch, rows) + sum(deeper) / max(1, len(deeper))
    return total, (model.logits(out.hidden), [model.logits(h) for h in out.mtp_hidden])

  (total, logits), gradient = jax.value_and_grad(loss, has_aux=True)(model)
  return Forward(*logits, total, gradient)


SEEN: list[
  np.ndarray
] = []  # of one list, since compiled programs go on writing to the one that they were traced with


@contextlib.contextmanager
def weights_seen() -> Iterator[list[np.ndarray]]:
  """Collects [B, S, E], what each layer that runs meanwhile multiplies its experts' outputs by."""
  original = moe_layer.route

  def spy(*args: object) -> Routing:
    routing = original(*args)
    each = jax.nn.one_hot(routing.expert_ids, routing.logits.shape[-1]) * routing.weights[..., None]
    jax.debug.callback(lambda a: SEEN.append(np.asarray(a)), each.sum(-2), ordered=True)
    return routing

  SEEN.clear()
  moe_layer.route = spy
  try:
    yield SEEN
    jax.effects_barrier()
  finally:
    moe_layer.route = original


def relative(a: np.ndarray, b: np.ndarray) -> float:
  """|a - b| / |b|, as vectors."""
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def of_forward(golden: Golden, mesh: Mesh | None = None) -> dict[str, float]:
  """Deviations of logits, combine weights and cross entropy in all three cases, and of the gradient of every parameter.

  On a mesh every row comes four times, so that eight devices have one or more each; no mean changes by that.
  """
  recorded, mtp = golden.recorded('golden'), golden.recorded('mtp') if golden.cfg.mtp_depth else {}
  batch, times = batch_of(recorded, CASES), 4 if mesh else 1
  rows = len(recorded['tokens'])
  many = jax.tree.map(lambda a: np.repeat(a, times, axis=0), batch)
  with jax.set_mesh(mesh) if mesh else weights_seen():
    model, router = golden.model, golden.router
    if mesh:
      model = jax.device_put(model, shardings(model, mesh))
      many = jax.device_put(many, NamedSharding(mesh, spec('batch')))
    out = jax.device_get(forward(model, router, many, rows * times))
  real = batch.segment_ids > 0
  found = {
    'logits': np.abs(out.logits[::times] - np.concatenate([recorded[c + 'logits'] for c in CASES]))[
      real
    ].max()
  }
  want = recorded['ce'] + (mtp['loss'] if mtp else 0)
  found['loss'] = abs(float(out.loss - want)) / float(want)
  layers = golden.cfg.num_layers - golden.cfg.num_dense_layers
  if golden.routes and not mesh:
    combine = np.concatenate([recorded[c + 'combine'] for c in CASES], axis=1)
    found['weights'] = max(
      np.abs(a - b)[real].max() for a, b in zip(SEEN[:layers], combine, strict=True)
    )
  for depth, logits in enumerate(out.mtp_logits, 1):
    deeper = np.concatenate([mtp[f'{c}logits_{depth - 1}'] for c in CASES])
    valid = real[:, :-depth] & real[:, depth:]
    found['logits'] = max(found['logits'], np.abs(logits[::times, :-depth] - deeper)[valid].max())
  ours, theirs = published(golden, out.gradient), golden.recorded('grads')
  for name, value in mtp.items():
    if name.startswith('grad/'):
      name = name.removeprefix('grad/')
      theirs[name] = theirs[name] + value if name in theirs else value
  assert set(ours) == set(theirs), set(ours) ^ set(theirs)
  return {k: float(v) for k, v in found.items()} | {
    'gradient': max(relative(ours[k], theirs[k]) for k in theirs)
  }


def of_steps(golden: Golden) -> dict[str, float]:
  """Deviation of the losses of six AdamW steps by the real training step, and of every parameter after them."""
  recorded, about = golden.recorded('steps'), golden.about['optimiser']
  batch = batch_of(golden.recorded('golden'), ('',))
  (rows, length), (beta1, beta2) = batch.tokens.shape, about['betas']
  cfg = ExperimentConfig(
    steps=STEPS,
    batch_size=rows,
    seq_len=length,
    model=golden.cfg,
    loss=LossConfig(mtp_coef='0'),
    balance=BalanceConfig(losses=frozendict(), bias_rule=''),
    optim=OptimConfig(
      about['learning_rate'],
      0,
      'constant',
      beta1=beta1,
      beta2=beta2,
      eps=about['eps'],
      weight_decay=about['weight_decay'],
      clip_norm=about['clip_norm'],
    ),
  )
  # Moments are zeros at the start, like all else but the weights and the router bias.
  state = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(lambda: init_state(cfg))
  )
  state = state._replace(
    model=golden.model, router=state.router._replace(bias=jnp.asarray(golden.router))
  )
  step, worst = jax.jit(functools.partial(train_step, cfg=cfg), compiler_options=QUICK), {}
  losses, norms = [], []
  for _ in range(STEPS):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
    norms.append(float(metrics['grad_norm']))
  worst['losses'] = max(
    relative(np.array(losses), recorded['losses']),
    relative(np.array(norms), recorded['grad_norms']),
  )
  ours = published(golden, jax.device_get(state.model))
  theirs = {k.removeprefix('param/'): v for k, v in recorded.items() if k.startswith('param/')}
  assert {name for name in ours if name in theirs} == set(theirs)
  return worst | {'steps': max(relative(ours[k], theirs[k]) for k in theirs)}


def of_text(golden: Golden) -> dict[str, float]:
  """Tokens of the greedy continuation, of two prompts in one batch, that differ; also with drafts, where there are any.

  The golden's was made without a cache, a row at a time.
  """
  recorded = golden.recorded('golden')
  prompts = [row[:n].tolist() for row, n in zip(recorded['tokens'], recorded['greedy_lengths'])]
  model, wrong = jax.tree.map(jnp.asarray, golden.model), 0
  for draft in (False, True)[: 1 + (golden.cfg.mtp_depth > 0)]:
    cfg = SampleConfig(max_tokens=recorded['greedy_tokens'].shape[1], temperature=0.0, draft=draft)
    steps = [*decode(model, jnp.asarray(golden.router), prompts, cfg)]
    text = np.array([sum((step[row] for step in steps), []) for row in range(len(prompts))])
    wrong += (text != recorded['greedy_tokens']).sum()
  return {'text': float(wrong)}


@functools.partial(jax.jit, compiler_options=QUICK)
def logits_of(model: Transformer, router: jax.Array, batch: Batch) -> jax.Array:
  """[B, S, V]."""
  return model.logits(model(batch, router).hidden)


def changed(cfg: T, values: dict[str, object]) -> T:
  """The config with other values at some dotted paths, all at once."""
  deeper = {path.partition('.')[0]: {} for path in values if '.' in path}
  for path, value in values.items():
    name, _, rest = path.partition('.')
    if rest:
      deeper[name][rest] = value
  direct = {name: value for name, value in values.items() if '.' not in name}
  return dataclasses.replace(
    cfg, **direct, **{name: changed(getattr(cfg, name), v) for name, v in deeper.items()}
  )


def always(cfg: ModelConfig) -> bool:
  return True


def grouped(cfg: ModelConfig) -> bool:
  return cfg.moe.router.num_groups > 1


def weighed(cfg: ModelConfig) -> bool:
  return cfg.moe.router.weigh == 'scores' and cfg.moe.router.num_experts > 1


class Mistake(NamedTuple):
  """Fields that come out wrong, as functions of what they are, where that can be."""

  fields: dict[str, Callable[[object], object]]
  possible: Callable[[ModelConfig], bool] = always


MISTAKES = {
  'eps': Mistake({'norm_eps': lambda eps: eps / 2}),
  'eps of the latent norms': Mistake(
    {'attention.latent.norm_eps': lambda eps: 1e-2 if eps < 1e-3 else 1e-6},
    lambda cfg: cfg.attention.latent.kv_rank > 0,
  ),
  'pairs of channels': Mistake({'attention.rope.interleaved': lambda on: not on}),
  'the whole head rotated': Mistake({'attention.rope.fraction': lambda part: 1.0}),
  'no YaRN': Mistake({'attention.rope.yarn.factor': lambda factor: 1.0}),
  'no mscale': Mistake({'attention.rope.yarn.mscale_all_dim': lambda m: 0.0}),
  'YaRN truncated': Mistake({'attention.rope.yarn.truncate': lambda on: True}),
  'window off by one': Mistake(
    {'attention.windows': lambda windows: tuple(w and w + 1 for w in windows)}
  ),
  'windows of the other layers': Mistake({'attention.windows': lambda windows: windows[::-1]}),
  'no clipping': Mistake({'attention.clip_qkv': lambda limit: 0.0}),
  'no group limit': Mistake(
    {'moe.router.num_groups': lambda n: 1, 'moe.router.top_groups': lambda n: 1}
  ),
  'groups by another score': Mistake({'moe.router.group_best': lambda n: 3 - n}, grouped),
  'weights normalised or not': Mistake({'moe.router.renormalise': lambda on: not on}, weighed),
  'weights not scaled': Mistake({'moe.router.scale': lambda scale: 1.0}),
  'another score': Mistake(
    {'moe.router.score_fn': lambda name: {'sigmoid': 'softmax', 'softmax': 'sigmoid'}[name]},
    weighed,
  ),
  'no clamp': Mistake(
    {'moe.activation_limit': lambda limit: 1e9}, lambda cfg: cfg.moe.activation != 'swiglu'
  ),
}


def mistaken(cfg: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
  """Each mistake that can be made with this config, and the config with it."""
  for name, mistake in MISTAKES.items():
    values = {
      path: change(functools.reduce(getattr, path.split('.'), cfg))
      for path, change in mistake.fields.items()
    }
    if mistake.possible(cfg) and changed(cfg, values) != cfg:
      yield name, changed(cfg, values)


def of_mistakes(golden: Golden) -> dict[str, float]:
  """Deviation of the logits for each likely mistake: a field that is wrong, a vector or the router bias ignored."""
  recorded = golden.recorded('golden')
  batch, found = batch_of(recorded, CASES), {}
  want, real = np.concatenate([recorded[c + 'logits'] for c in CASES]), batch.segment_ids > 0

  def deviation(model: Transformer, router: np.ndarray) -> float:
    return float(np.abs(logits_of(model, router, batch) - want)[real].max())

  leaves, tree = jax.tree.leaves(golden.model), jax.tree.structure(golden.model)
  for name, cfg in mistaken(golden.cfg):
    shapes = jax.eval_shape(lambda key, cfg=cfg: Transformer(key, cfg), jax.random.key(0))
    found[name] = deviation(jax.tree.unflatten(jax.tree.structure(shapes), leaves), golden.router)
  if golden.router.any():
    found['router bias ignored'] = deviation(golden.model, np.zeros_like(golden.router))
  neutral = {
    'scale': 1.0,
    'b': 0.0,
    'sinks': -1e9,
    'gate_bias': 0.0,
    'up_bias': 0.0,
    'down_bias': 0.0,
    'router_logit_bias': 0.0,
  }
  for i, path in enumerate(path for path in golden.made_of if path != 'router.bias'):
    last = path.split('.')[-1]
    if last in neutral and not path.startswith('mtp.'):
      ignored = [*leaves[:i], np.full_like(leaves[i], neutral[last]), *leaves[i + 1 :]]
      found[f'{path} ignored'] = deviation(jax.tree.unflatten(tree, ignored), golden.router)
  return found


COLUMNS = {
  'logits': 1e-4,
  'weights': 1e-5,
  'loss': 1e-5,
  'gradient': 1e-4,
  'losses': 1e-4,
  'steps': 1e-4,
  'text': 0.0,
  'mesh logits': 1e-4,
  'mesh gradient': 1e-4,
}  # what is measured -> how much of it is allowed


def mesh_for(golden: Golden) -> Mesh:
  """Of eight devices; a dense model's one expert is not split."""
  return make_mesh(
    MeshConfig(data=2, fsdp=2, expert=2) if golden.routes else MeshConfig(data=4, fsdp=2)
  )


def measure(golden: Golden) -> dict[str, float]:
  """All columns of a family's row."""
  on_mesh = {f'mesh {name}': value for name, value in of_forward(golden, mesh_for(golden)).items()}
  found = of_forward(golden) | of_steps(golden) | of_text(golden) | on_mesh
  return {column: found[column] for column in COLUMNS if column in found}


TITLES = {
  'logits': 'logits',
  'weights': 'combine weights',
  'gradient': 'gradients',
  'steps': 'six AdamW steps',
  'text': 'other tokens',
  'mesh logits': 'logits, 8 devices',
  'mesh gradient': 'gradients, 8 devices',
}


def written(value: float | None, column: str) -> str:
  """A cell of the table."""
  return (
    '-'
    if value is None
    else f'{value:.0f}'
    if column == 'text'
    else f'{value:.1e}'.replace('e-0', 'e-')
  )


def readme_rows(rows: dict[str, dict[str, str]]) -> str:
  """The table for README, without what only a developer looks at."""
  cells = [['family', *TITLES.values()], ['---'] * (1 + len(TITLES))]
  cells += [[name, *(row[column] for column in TITLES)] for name, row in rows.items()]
  return '\n'.join(f'| {" | ".join(row)} |' for row in cells)


def main() -> None:
  """Prints the table; exits with 1 where something is not within its bounds."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', nargs='*', default=NAMES, choices=NAMES, help='some families')
  parser.add_argument(
    '--readme', default='', metavar='FILE', help='rewrite the table between its two comments'
  )
  args, rows, failed = parser.parse_args(), {}, False
  table = rich.table.Table('family', *COLUMNS, 'smallest mistake')
  for name in args.only:
    print(name, file=sys.stderr)
    golden = load(name)
    found, mistakes = measure(golden), of_mistakes(golden)
    failed |= not all(value <= COLUMNS[column] for column, value in found.items())
    rows[name] = {
      column: written(found[column] if column in found else None, column) for column in COLUMNS
    }
    least = min(mistakes, key=mistakes.__getitem__)
    table.add_row(name, *rows[name].values(), f'{mistakes[least]:.1e} {least}')
  bounds = {column: written(value, column) for column, value in COLUMNS.items()}
  table.add_row('allowed', *bounds.values(), '')
  Console(width=200).print(table)
  if args.readme:
    rewrite(Path(args.readme), 'families', readme_rows(rows | {'allowed': bounds}))
  raise SystemExit(failed)


if __name__ == '__main__':
  main()
