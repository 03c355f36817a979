"""The configs of the tiny model that whole steps are taken with.

All losses, one alone or several at once, are one program: their coefficients are schedules, and the
step number says which of them are on.
"""

import dataclasses

from moejax.config import frozendict
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.model.cross_entropy import LossConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.balance.losses import BALANCE_LOSSES
from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.optimizer import OptimConfig

ROWS, LENGTH, VOCAB = 8, 12, 32
STEPS = 100  # of the run that schedules are parts of, so that a percent is a step
CUT_DEPENDENT = ('micro_batch', 'gshard')  # another loss for another cut, by definition
ALONE = 10  # the first step at which one loss alone has a coefficient
ALONE_STEPS = 8  # for which it stays alone, until the next loss is
WEIGHT = 20  # the coefficient of a loss that is alone


def loss_names(noisy: bool = False) -> list[str]:
  """The losses of a run. 'load' needs a noisy router, and does not know of a bias."""
  return [name for name in sorted(BALANCE_LOSSES) if noisy or name != 'load']


def terms_alone(noisy: bool = False) -> list[str]:
  """The logged terms that are alone beside lm_loss for some steps, in the order of those steps."""
  return [*(f'balance/{name}' for name in loss_names(noisy)), 'z_loss', 'mtp_loss']


def step_alone(term: str, noisy: bool = False) -> int:
  """The first step at which this term alone has a coefficient; after the last one none has."""
  return ALONE + ALONE_STEPS * (*terms_alone(noisy), '').index(term)


def alone_schedule(first: str, term: str, noisy: bool) -> str:
  """The coefficient schedule of a term: `first` at step 0, then nothing but where it is alone."""
  begin = step_alone(term, noisy)
  last = f', 0@{begin + ALONE_STEPS}%'
  return f'{first}, 0@{ALONE}%, {WEIGHT}@{begin}%{last}'


def schedules(noisy: bool) -> frozendict:
  """The coefficient schedule of each loss, by name.

  At step 0 all losses that do not depend on the cut are on, later one after the other: one program
  serves all of it.
  """
  texts = {}
  for name in loss_names(noisy):
    first = '0' if name in CUT_DEPENDENT else '0.1'
    texts[name] = alone_schedule(first, f'balance/{name}', noisy)
  return frozendict(texts)


def base_config(noisy: bool = False) -> ExperimentConfig:
  """The base of all comparisons: the fastest dispatcher to compile, one micro-batch, no mesh."""
  moe = MoEConfig(
    RouterConfig(4, 2, noisy=noisy), DispatchConfig('dense_matmul'), d_expert=8, num_shared=1
  )
  return ExperimentConfig(
    steps=STEPS,
    batch_size=ROWS,
    seq_len=LENGTH,
    loss=LossConfig(
      z_coef=alone_schedule('1e-3', 'z_loss', noisy),
      mtp_coef=alone_schedule('0.3', 'mtp_loss', noisy),
      chunks=2,
    ),
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


def rich_config(noisy: bool = False) -> ExperimentConfig:
  """A model with a layer of every kind, and an optimiser with everything on.

  A dense layer, two of experts with a gate on the shared one and a scale on the others, and a block
  of multi-token prediction. The norm at which gradients are clipped lies between those of step 0
  and of the steps at which a term is alone.
  """
  base = base_config(noisy)
  router = RouterConfig(4, 2, 'sigmoid', scale=2.5, noisy=noisy)
  # Nothing is left of the rate in the end, where parameters then must stay.
  optim = OptimConfig(
    learning_rate=0.01, warmup_steps=3, final_fraction=0.0, eps=1e-4, clip_norm=4.0
  )
  return change(
    base,
    router=router,
    shared_gate=True,
    num_layers=3,
    num_dense_layers=1,
    d_ff=16,
    mtp_depth=1,
    optim=optim,
  )


def other_config() -> ExperimentConfig:
  """A model with what `rich_config` leaves at its default, wherever the two can differ.

  A dense layer after one with experts, tied embeddings, biases of experts, of the router and of
  projections, sinks, windows, groups of experts, a shared expert of a width of its own, buffers
  that overflow, two depths of prediction, losses of groups of experts that see what was dispatched,
  and a last chunk of the loss that is not full.
  """
  base = base_config()
  router = RouterConfig(8, 3, 'sigmoid', num_groups=4, top_groups=2, group_best=1, logit_bias=True)
  attention = AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    d_head=8,
    windows=(0, 4),
    qk_norm='head',
    qkv_bias=True,
    out_bias=True,
    sinks=True,
  )
  balance = dataclasses.replace(
    base.balance, partition=4, assignment='dispatched', probability='softmax'
  )
  return change(
    base,
    router=dataclasses.replace(router, weigh='softmax'),
    dispatch=DispatchConfig('dense_matmul', 1.0, 'position'),
    activation='clamped_swiglu',
    activation_limit=5.0,
    expert_bias=True,
    d_shared=6,
    ffn_pattern=('moe', 'dense'),
    d_ff=16,
    attention=attention,
    tie_embeddings=True,
    sandwich_norm=True,
    mtp_depth=2,
    remat='full',
    unroll=2,
    balance=balance,
    loss=dataclasses.replace(base.loss, chunks=5),
  )


def change(cfg: ExperimentConfig, **changes: object) -> ExperimentConfig:
  """A config with other fields: of the root, of the model, of its MoE layers, by their names."""

  def fields_of(kind: type) -> dict[str, object]:
    return {k: v for k, v in changes.items() if k in kind.__dataclass_fields__}

  moe = dataclasses.replace(cfg.model.moe, **fields_of(MoEConfig))
  model = dataclasses.replace(cfg.model, **fields_of(ModelConfig) | {'moe': moe})
  return dataclasses.replace(cfg, **fields_of(ExperimentConfig) | {'model': model})
