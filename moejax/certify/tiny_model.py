"""The tiny model that whole steps are taken with: its config, batch, initial state and step.

  (config, mesh) -> one training step -> gradient, terms, load, router bias; then who is chosen next

The initial state has routers that choose unevenly. All losses, one alone or several at once, are
one program: their coefficients are schedules, and the step number says which of them are on.

Letters: B batch, S sequence, E experts, L MoE layers.
"""

import dataclasses
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding

from moejax.certify.cases import Plan
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.config import frozendict
from moejax.data.batch import IGNORE, Batch, make_batch
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.transformer import Transformer
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.bias import BiasState
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig, Routing
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig
from moejax.train.step import train_state as state
from moejax.train.step import train_step as step

ROWS, LENGTH, VOCAB = 8, 12, 32
STEPS = 100  # of the run that schedules are parts of, so that a percent is a step
CUT_DEPENDENT = ('micro_batch', 'gshard')  # another loss for another cut, by definition
ALONE = 10  # the first step at which one loss alone has a coefficient
ALONE_STEPS = 8  # for which it stays alone, until the next loss is
WEIGHT = 20  # the coefficient of a loss that is alone


def loss_names(noisy: bool = False) -> list[str]:
  """The losses of a run. 'load' needs a noisy router, and does not know of a bias."""
  return [name for name in sorted(BALANCE_LOSSES) if noisy or name != 'load']


def step_alone(name: str, noisy: bool = False) -> int:
  """The first step at which this loss alone has a coefficient."""
  return ALONE + ALONE_STEPS * loss_names(noisy).index(name)


def schedules(noisy: bool) -> frozendict:
  """The coefficient schedule of each loss, by name.

  At step 0 all losses that do not depend on the cut are on, later one after the other: one program
  serves all of it.
  """
  texts = {}
  for name in loss_names(noisy):
    first = '0' if name in CUT_DEPENDENT else '0.1'
    begin = step_alone(name, noisy)
    texts[name] = f'{first}, 0@{ALONE}%, {WEIGHT}@{begin}%, 0@{begin + ALONE_STEPS}%'
  return frozendict(texts)


def config(noisy: bool = False) -> ExperimentConfig:
  """The base of all comparisons: the fastest dispatcher to compile, one micro-batch, no mesh."""
  moe = MoEConfig(
    RouterConfig(4, 2, noisy=noisy), DispatchConfig('dense_matmul'), d_expert=8, num_shared=1
  )
  return ExperimentConfig(
    steps=STEPS,
    batch_size=ROWS,
    seq_len=LENGTH,
    loss=LossConfig(z_coef=f'1e-3, 0@{ALONE}%', chunks=2),
    model=ModelConfig(
      vocab_size=VOCAB,
      d_model=16,
      num_layers=2,
      attention=AttentionConfig(num_heads=2, num_kv_heads=2, d_head=8),
      moe=moe,
    ),
    balance=BalanceConfig(schedules(noisy), '' if noisy else 'sign', '0.05, 0@50%', ep_groups=4),
    # A large eps makes the update smooth in the gradient: at 1e-8 it would be the sign of the
    # rounding of a zero.
    optim=OptimConfig(learning_rate=0.05, warmup_steps=0, eps=1e-2, clip_norm=0.0),
  )


def change(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  """A config with other fields: of the root, of the model, of its MoE layers, by their names."""

  def fields_of(kind: type) -> dict[str, object]:
    return {k: v for k, v in changes.items() if k in kind.__dataclass_fields__}

  moe = dataclasses.replace(cfg.model.moe, **fields_of(MoEConfig))
  model = dataclasses.replace(cfg.model, **fields_of(ModelConfig) | {'moe': moe})
  return dataclasses.replace(cfg, **fields_of(ExperimentConfig) | {'model': model})


def batch(seed: int = 0) -> Batch:
  """Documents of uneven lengths, one row half padding, one row all padding but a token."""
  rng = np.random.default_rng(seed)
  text = rng.integers(1, VOCAB, (ROWS, LENGTH + 1))
  segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.2, 1) + 1
  segments[2, LENGTH // 2 :] = 0
  segments[5, 1:] = 0
  return packed(text, segments)


def packed(text: np.ndarray, segments: np.ndarray) -> Batch:
  """The batch of ids [B, S + 1] in documents [B, S], 0 for padding; all of task 0."""
  return make_batch(text[:, :-1], np.where(segments > 0, text[:, 1:], IGNORE), segments)


def tiny_state_shapes(plan: Plan, cfg: ExperimentConfig) -> state.TrainState:
  """The state of a config, shapes for arrays. Traced once a run: it is asked for often."""
  return plan.once(('shapes', cfg), lambda: jax.eval_shape(lambda: state.init_state(cfg)))


def start_state(plan: Plan, cfg: ExperimentConfig) -> state.TrainState:
  """A state with a bias that matters where there is a rule for it.

  Its routers choose unevenly, as trained ones do. Parameters are the same for all configs that
  have a noisy router, and for all that have none.
  """
  noisy = cfg.model.moe.router.noisy

  def parameters() -> list[np.ndarray]:
    make = plan.program(lambda: state.init_state(config(noisy)).model)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(make())]

  shapes = tiny_state_shapes(plan, cfg)
  blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
  leaves = [jnp.asarray(leaf) for leaf in plan.once(('parameters', noisy), parameters)]
  model = jax.tree.unflatten(jax.tree.structure(shapes.model), leaves)
  model.blocks.moe.router[...] = 20 * model.blocks.moe.router[...]
  shape, size = blank.router.bias.shape, blank.router.bias.size
  bias = 0.02 * jnp.arange(size, dtype=jnp.float32).reshape(shape) % 0.07
  has_rule = bool(cfg.balance.bias_rule)
  return blank._replace(model=model, router=BiasState(bias * has_rule, blank.router.momentum))


class StepResult(NamedTuple):
  """What one training step did."""

  after: state.TrainState
  metrics: step.Metrics

  @property
  def terms(self) -> dict[str, float]:
    """The terms of the objective as they are logged, without their coefficients."""
    return {
      name: float(value)
      for name, value in self.metrics.items()
      if name in ('lm_loss', 'z_loss') or name.startswith('balance/')
    }


def one_step(
  before: state.TrainState, rows: Batch, cfg: ExperimentConfig, mesh: MeshConfig | None
) -> tuple[state.TrainState, step.Metrics]:
  """A training step. The mesh is an argument so that each mesh has a program of its own."""
  del mesh
  return step.train_step(before, rows, cfg)


def take_step(
  plan: Plan,
  cfg: ExperimentConfig,
  before: state.TrainState,
  rows: Batch,
  mesh: MeshConfig | None = None,
) -> StepResult:
  """One training step, on a mesh of virtual devices if one is given."""
  program = plan.program(one_step, cfg, mesh)
  if mesh is None:
    return StepResult(*program(before, rows))
  devices = make_mesh(mesh)
  with jax.set_mesh(devices):
    # Two programs of eight virtual devices at once, and each may hold the threads that the other
    # waits for; to lay arrays out anew is a program, too.
    state_on_mesh = jax.device_put(before, shardings(before, devices))
    rows_on_mesh = jax.device_put(rows, NamedSharding(devices, spec('batch')))
    jax.block_until_ready((state_on_mesh, rows_on_mesh))
    return jax.block_until_ready(StepResult(*program(state_on_mesh, rows_on_mesh)))


def save_and_restore(whole: state.TrainState) -> state.TrainState:
  """A state as a checkpoint on disk gives it back."""
  with tempfile.TemporaryDirectory() as directory:
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(1, whole, {})
    checkpoints.close()
    return Checkpoints(directory, CheckpointConfig(), readonly=True).restore(whole, {})[1]


def gradient(result: StepResult, cfg: ExperimentConfig) -> np.ndarray:
  """The gradient as the optimiser got it in its first step, all parameters in one vector.

  The first moment is then (1 - beta1) times the gradient.
  """
  moments = optax.tree.get_all_with_path(result.after.opt_state, 'mu')[0][1]
  flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moments)])
  return flat / (1 - cfg.optim.beta1)


def layer_routings(model: Transformer, bias: Array, rows: Batch) -> Routing:
  """Each MoE layer's routing, by running one block after the other. [L, B, S, ...]."""
  x = model.embed(rows.tokens, jnp.float32)
  mask, row_numbers = rows.segment_ids > 0, jnp.arange(rows.tokens.shape[0])
  tokens = Tokens(rows.tokens, mask, rows.segment_ids, row_numbers)
  routings = []
  for i in range(bias.shape[0]):
    block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
    x = x + block.attention(block.attention_norm(x), rows.segment_ids, rows.positions)[0]
    h = block.moe_norm(x)
    routings.append(block.moe.route(h, bias[i], tokens))
    x = x + block.moe(h, bias[i], tokens, {})[0]
  return jax.tree.map(lambda *a: jnp.stack(a), *routings)


def state_routing(plan: Plan, current: state.TrainState, rows: Batch) -> Routing:
  """Who every token is given to in a state, [L, B, S, ...] in NumPy.

  One program for all states, whatever program made them: what differs is then the state.
  """
  cfg = config(current.model.cfg.moe.router.noisy)
  structure = jax.tree.structure(tiny_state_shapes(plan, cfg).model)
  model = jax.tree.unflatten(
    structure, [np.asarray(leaf) for leaf in jax.tree.leaves(current.model)]
  )
  program = plan.program(layer_routings)
  return jax.tree.map(np.asarray, program(model, np.asarray(current.router.bias), rows))
