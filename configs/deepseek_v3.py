"""DeepSeek-V3's pre-training as its report has it (2412.19437), and the same in small on two CPU
cores.

  python train.py --config=configs/deepseek_v3.py:tiny
  python train.py --config=configs/deepseek_v3.py \
    --config.data.path=GLOBS --config.data.tokenizer=FILE

From sections 2.1, 2.2 and 4.2: the model and its initialisation, AdamW and clipping, the rate over
14.8T tokens, rows of 4096 tokens, the sequence-wise balance loss and the bias rate, lambda of
multi-token prediction (MTP), and no token dropped; tests hold these to the figures there. By count
671.0B parameters, 37.6B of them active, and 11.6B of MTP.

Not as in the report: the batch is 15360 rows from the first step, where theirs grows to that from
3072 over 469B tokens, so that the 2000 steps of warm-up are more tokens. The balance loss is the
mean over layers; the report does not say whether theirs add up. bfloat16 instead of FP8, float32
moments; documents do not see one another, and none is filled in the middle. YaRN and two stages of
longer context come after this one (section 4.3). The report's text is not public: bring yours, and
a tokenizer of at most 129280 tokens.

Hardware: 512 chips of TPU v5p, or 256 H200s with --config.mesh.fsdp=32 --config.micro_batches=60.
Not run so far: shapes and figures are what is checked, and that the compilers for both find room
for a step, 67 of a v5p's 96 GiB and 85 of an H200's 131: add --plan --topology=v5p:8x8x8, or
h200:256, to see what of.

`:tiny` takes a minute on two CPU cores, on the standard library's sources, with every part at 2 M
parameters. Its rate is 18 times and its bias rate 10 times as high, for 120 steps instead of
235240, and init.std goes with the root of d_model: 2.310 bits per byte of held-out text (2.97 for
single tokens' frequencies), MaxVio 0.25.
"""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from moejax.config import frozendict, to_config_dict
from moejax.data.sources import DataConfig
from moejax.families.deepseek_v3 import DEEPSEEK_V3
from moejax.model.config import InitConfig
from moejax.model.cross_entropy import LossConfig
from moejax.model.rope import RopeConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import EvalConfig, ExperimentConfig
from moejax.train.optimizer import OptimConfig

PEAK = 2.2e-4  # the highest learning rate
TOKENS = 14.8e12  # of the whole run


def after(tokens: float) -> str:
  """The part of the run at which so many tokens have been seen."""
  return f'{100 * tokens / TOKENS:.4f}%'


def full() -> ExperimentConfig:
  """The run of the report."""
  published, batch_size, seq_len = DEEPSEEK_V3.presets['full'], 15360, 4096
  # Constant, a cosine to a tenth, constant, and 7.3e-6 at the very end.
  phases = (
    '1',
    f'cosine 0.1@{after(10e12)}',
    f'0.1@{after(14.3e12)}',
    f'{7.3e-6 / PEAK:.6f}@{after(14.633e12)}',
  )
  return ExperimentConfig(
    steps=round(TOKENS / (batch_size * seq_len)),
    batch_size=batch_size,
    seq_len=seq_len,
    micro_batches=30,
    workdir='runs/deepseek_v3',
    data=DataConfig(source='text', path='text/**/*.jsonl.gz', tokenizer='text/tokenizer.json'),
    model=dataclasses.replace(
      published,
      attention=dataclasses.replace(published.attention, rope=RopeConfig(interleaved=True)),
      init=InitConfig(std=0.006),
      dtype='bfloat16',
      remat='full',
    ),
    loss=LossConfig(mtp_coef=f'0.3, 0.1@{after(10e12)}'),
    balance=BalanceConfig(
      losses=frozendict(sequence='0.0001'),
      bias_rule='sign',
      bias_rate=f'0.001, 0@{after(14.3e12)}',
    ),
    optim=OptimConfig(
      learning_rate=PEAK,
      warmup_steps=2000,
      schedule='phases',
      phases=', '.join(phases),
    ),
    mesh=MeshConfig(data=1, fsdp=64, expert=8),
    eval=EvalConfig(every=1000, batches=16),
  )


def tiny() -> ExperimentConfig:
  """Every part of the report's run in small."""
  big, d_model = full(), 128
  attention, moe = big.model.attention, big.model.moe
  return dataclasses.replace(
    big,
    steps=120,
    batch_size=8,
    seq_len=256,
    micro_batches=1,
    workdir='runs/deepseek_v3_tiny',
    data=DataConfig(tokenizer='bpe:2048'),
    model=dataclasses.replace(
      big.model,
      vocab_size=0,
      d_model=d_model,
      num_layers=3,
      num_dense_layers=1,
      d_ff=384,
      dtype='float32',
      remat='none',
      init=InitConfig(std=0.006 * (big.model.d_model / d_model) ** 0.5),
      attention=dataclasses.replace(
        attention,
        num_heads=4,
        num_kv_heads=4,
        d_head=32,
        latent=dataclasses.replace(attention.latent, kv_rank=64, q_rank=96, d_rope=16, d_value=32),
      ),
      moe=dataclasses.replace(
        moe,
        d_expert=64,
        router=dataclasses.replace(moe.router, num_experts=16, top_k=4, num_groups=4, top_groups=2),
      ),
    ),
    balance=dataclasses.replace(big.balance, bias_rate=f'0.01, 0@{after(14.3e12)}'),
    optim=dataclasses.replace(big.optim, learning_rate=4e-3, warmup_steps=20),
    mesh=MeshConfig(),
    eval=EvalConfig(every=60, batches=4),
  )


def get_config(variant: Literal['', 'tiny'] = '') -> ConfigDict:
  """The report's run, or a tiny one."""
  return to_config_dict(tiny() if variant else full())
