"""The tiny model that whole steps are taken with: its batch, initial state and step.

  (config, mesh) -> one training step -> gradient, terms, load, router bias; then who is chosen next

The initial state has routers that choose unevenly; it and the batch follow from the plan's seed.

Letters: B batch, S sequence, E experts, L MoE layers.
"""

import tempfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding

from moejax.certify.cases import Plan
from moejax.certify.float64 import in_float64
from moejax.certify.tiny_config import LENGTH, ROWS, VOCAB, base_config
from moejax.checkpoint.checkpoints import CheckpointConfig, Checkpoints
from moejax.config import frozendict
from moejax.data.batch import IGNORE, Batch, make_batch
from moejax.model.transformer import Transformer
from moejax.moe.bias import BiasState
from moejax.moe.routing import Routing
from moejax.moe.selection import Tokens
from moejax.sharding.logical_axes import spec
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import shardings
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.step import train_state as state
from moejax.train.step import train_step as step

NUDGE = 1e-5  # of activations, as a part of them: ten times what another order of sums makes
CLEAR = 1e-4  # the least margin of a choice, which sums in another order do not flip
STD = 0.2  # of the matrices that a state starts with; routers have twice that


def batch(seed: int | tuple[int, ...] = 0) -> Batch:
  """Documents of uneven lengths, one row half padding, one row all padding but a token."""
  rng = np.random.default_rng(seed)
  text = rng.integers(1, VOCAB, (ROWS, LENGTH + 1))
  segments = np.cumsum(rng.random((ROWS, LENGTH)) < 0.2, 1) + 1
  segments[2, LENGTH // 2 :] = 0
  segments[5, 1:] = 0
  return packed(text, segments)


def batch_of(plan: Plan) -> Batch:
  """The batch of the plan's seed, of whose tokens none is near to having another expert.

  A sum in another order would then decide who is chosen, and loads are compared as whole numbers.
  """

  def draw() -> Batch:
    before = start_state(plan, base_config())
    for number in range(100):
      rows = batch((plan.seed, number))
      if smallest_margin(plan, before, rows) > CLEAR:
        return rows
    raise ValueError(f'seed {plan.seed}: none of 100 batches has a margin of {CLEAR}')

  return plan.once(('batch', plan.seed), draw)


def batch_of_router(plan: Plan, cfg: ExperimentConfig) -> Batch:
  """The batch of the plan's seed for a config with a router of its own: no choice is a near tie.

  Where experts choose tokens, two that open a document with the same word are one: a tie.
  """

  def draw() -> Batch:
    before = start_state(plan, cfg)
    for number in range(100):
      rows = batch((plan.seed, number))
      if choice_is_clear(plan, before, rows):
        return rows
    raise ValueError(f'seed {plan.seed}: each of 100 batches has a near tie for {cfg.model.moe}')

  return plan.once(('batch', cfg, plan.seed), draw)


def choice_is_clear(plan: Plan, before: state.TrainState, rows: Batch) -> bool:
  """Whether every layer chooses the same experts when what its router sees is nudged a little.

  This asks no selection how it ranks. Eight nudges: a tie stands all of them once in 256 times.
  """
  program, shape = plan.program(layer_routings), (*rows.tokens.shape, base_config().model.d_model)

  def chosen(nudge: np.ndarray) -> np.ndarray:
    routed = program(before.model, before.router.bias, rows, nudge.astype(np.float32))
    return np.asarray(routed.expert_ids)

  rng = plan.rng(21)
  nudges = NUDGE * rng.normal(size=(8, *shape))
  first = chosen(np.zeros(shape))
  return all((chosen(nudge) == first).all() for nudge in nudges)


def smallest_margin(plan: Plan, before: state.TrainState, rows: Batch) -> float:
  """How near any token that counts is to other experts, with the bias or without, in any layer.

  The best score less the next, and the last that is chosen less the first that is not.
  """
  routed, mask = state_routing(plan, before, rows), rows.segment_ids > 0
  smallest = np.inf
  for scores in (routed.scores, routed.scores + np.asarray(before.router.bias)[:, None, None]):
    ranked = -np.sort(-scores, axis=-1)[:, mask]  # [L, tokens, E]
    gaps = -np.diff(ranked)[..., :2]  # of the first two, and of the second and the third: K = 2
    smallest = min(smallest, float(gaps.min()))
  return smallest


def packed(text: np.ndarray, segments: np.ndarray) -> Batch:
  """The batch of ids [B, S + 1] in documents [B, S], 0 for padding; all of task 0."""
  return make_batch(text[:, :-1], np.where(segments > 0, text[:, 1:], IGNORE), segments)


def tiny_state_shapes(plan: Plan, cfg: ExperimentConfig) -> state.TrainState:
  """The state of a config, shapes for arrays. Traced once a run: it is asked for often."""
  return plan.once(('shapes', cfg), lambda: jax.eval_shape(lambda: state.init_state(cfg)))


def draw_parameters(plan: Plan, shapes: Transformer) -> Transformer:
  """Parameters of the plan's seed for a model of these shapes: nothing is compiled.

  Routers choose unevenly, as trained ones do, and experts matter. A parameter is the same in all
  models that have it.
  """

  def draw(path: str, shape: tuple[int, ...]) -> Array:
    normal = plan.rng(20, zlib.crc32(path.encode())).normal(size=shape)
    if path.endswith('scale/value'):
      return jnp.asarray(1 + 0.1 * normal, jnp.float32)
    return jnp.asarray((2 if 'router' in path else 1) * STD * normal, jnp.float32)

  leaves = [draw(path, leaf.shape) for path, leaf in named_leaves(shapes).items()]
  return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def start_state(plan: Plan, cfg: ExperimentConfig) -> state.TrainState:
  """A state with parameters of the plan's seed, and a bias that matters where there is a rule."""

  def make() -> state.TrainState:
    shapes = tiny_state_shapes(plan, cfg)
    blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    shape, size = blank.router.bias.shape, blank.router.bias.size
    bias = 0.02 * jnp.arange(size, dtype=jnp.float32).reshape(shape) % 0.07
    has_rule = bool(cfg.balance.bias_rule)
    router = BiasState(bias * has_rule, blank.router.momentum)
    return blank._replace(model=draw_parameters(plan, shapes.model), router=router)

  # A copy: of a module that is kept, what is set would stay in it.
  return jax.tree.map(lambda a: a, plan.once(('start', cfg, plan.seed), make))


def named_leaves(tree: object) -> dict[str, Array]:
  """The leaves of a model, or of moments like it, by path, in the order of the tree."""
  leaves = {}
  for keys, leaf in jax.tree.leaves_with_path(tree):
    leaves[jax.tree_util.keystr(keys, simple=True, separator='/')] = leaf
  return leaves


TERMS = ('lm_loss', 'z_loss', 'mtp_loss')  # of the objective, besides the balance losses


def terms_of(metrics: step.Metrics) -> dict[str, Array]:
  """The terms of the objective as they are logged, without their coefficients."""
  names = [name for name in metrics if name in TERMS or name.startswith('balance/')]
  return {name: metrics[name] for name in names}


class StepResult(NamedTuple):
  """What one training step did."""

  after: state.TrainState
  metrics: step.Metrics

  @property
  def terms(self) -> dict[str, float]:
    """The logged terms of the objective, see `terms_of`."""
    return {name: float(value) for name, value in terms_of(self.metrics).items()}


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


def take_step64(
  plan: Plan, cfg: ExperimentConfig, before: state.TrainState, rows: Batch
) -> StepResult:
  """One training step with all of its arithmetic in float64, in NumPy arrays."""

  def make() -> Callable:
    shapes = tiny_state_shapes(plan, cfg)
    return in_float64(lambda before, rows: one_step(before, rows, cfg, None), shapes, rows)

  return StepResult(*plan.program64(('step', cfg), make)(before, rows))


def save_and_restore(whole: state.TrainState) -> state.TrainState:
  """A state as a checkpoint on disk gives it back."""
  with tempfile.TemporaryDirectory() as directory:
    checkpoints = Checkpoints(directory, CheckpointConfig())
    checkpoints.save(1, whole, {})
    checkpoints.close()
    return Checkpoints(directory, CheckpointConfig(), readonly=True).restore(whole, {})[1]


def leaf_gradients(result: StepResult, cfg: ExperimentConfig) -> dict[str, np.ndarray]:
  """The gradient of each leaf as the optimiser got it in its first step, before it was clipped.

  The first moment is then (1 - beta1) times the clipped one.
  """
  moments = optax.tree.get_all_with_path(result.after.opt_state, 'mu')[0][1]
  clip, norm = cfg.optim.clip_norm, float(result.metrics['grad_norm'])
  factor = max(1.0, norm / clip) / (1 - cfg.optim.beta1) if clip else 1 / (1 - cfg.optim.beta1)
  return {name: factor * np.asarray(leaf) for name, leaf in named_leaves(moments).items()}


def layer_routings(
  model: Transformer, bias: Array, rows: Batch, nudge: Array | float = 0.0
) -> Routing:
  """Each MoE layer's routing, by running one block after the other. [L, B, S, ...].

  nudge: [B, S, D], by how much of itself what each router sees is changed.
  """
  x = model.embed(rows.tokens, jnp.float32)
  mask, row_numbers = rows.segment_ids > 0, jnp.arange(rows.tokens.shape[0])
  tokens = Tokens(rows.tokens, mask, rows.segment_ids, row_numbers)
  routings = []
  for i in range(bias.shape[0]):
    block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
    x = x + block.attention(block.attention_norm(x), rows.segment_ids, rows.positions)[0]
    h = block.moe_norm(x) * (1 + nudge)
    routings.append(block.moe.route(h, bias[i], tokens))
    # As in training, where a full expert drops; but no losses, which may be of larger sets.
    block.moe.scopes = frozendict()
    x = x + block.moe(h, bias[i], tokens, {})[0]
  return jax.tree.map(lambda *a: jnp.stack(a), *routings)


def state_routing(plan: Plan, current: state.TrainState, rows: Batch) -> Routing:
  """Who every token is given to in a state, [L, B, S, ...] in NumPy.

  One program for all states, whatever program made them: what differs is then the state. Blocks of
  multi-token prediction are left out.
  """
  cfg = base_config(current.model.cfg.moe.router.noisy)
  base, leaves = tiny_state_shapes(plan, cfg), named_leaves(current.model)
  model = jax.tree.unflatten(
    jax.tree.structure(base.model), [np.asarray(leaves[name]) for name in named_leaves(base.model)]
  )
  bias = np.asarray(current.router.bias)[: len(base.router.bias)]
  program = plan.program(layer_routings)
  return jax.tree.map(np.asarray, program(model, bias, rows))
