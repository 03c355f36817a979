"""openPangu-Ultra-MoE-718B's pre-training as far as it is public (2505.04519), and the same in
small on two CPU cores.

  python train.py --config=configs/openpangu_ultra_moe.py:tiny
  python train.py --config=configs/openpangu_ultra_moe.py \
    --config.data.path=GLOBS --config.data.tokenizer=FILE

Public: the model, by its config.json and Huawei's serving code: by count 719.1B parameters, 40.4B
of them active, and 12.4B of multi-token prediction. About 19T tokens. Depth-scaled sandwich norm,
TinyInit and the embedding's deviation are those of Pangu Ultra, the dense 135B (2504.07866). That
experts are balanced over the tokens of an expert-parallel group is 2505.04519's idea; our formula
is `ep_group` of moejax/moe/balance, without a look at theirs.

Ours, for want of a source: AdamW at 1e-4 with 2000 steps of warm-up and a cosine to a tenth, 0.9,
0.95, decay 0.1, clipping at 1; the coefficient 0.1, 0.01, 0.001 of the balance loss; lambda 0.3;
batch, rows of 4096 and mesh. Nothing is dropped, and there is no expert dropout:
--config.model.moe.router.expert_dropout=0.1 adds it, for 0.006 bits per byte in `:tiny`. Neither a
curriculum nor early stopping is built. The text is not public: bring yours, and a tokenizer of at
most 153600 tokens.

Hardware: 512 chips of TPU v5p, or 256 H200s with --config.mesh.fsdp=64 --config.mesh.expert=4
--config.micro_batches=8. It has not been run: shapes and figures are what is checked, and that the
compilers for both find room for a step, 77 of a v5p's 96 GiB and 119 of an H200's 131: add --plan
--topology=v5p:8x8x8, or h200:256, to see what of.

`:tiny` takes a minute on two CPU cores, on the standard library's sources, with every part at 2 M
parameters. Its rate is 40 times and its balance coefficient 10 times as high, for 120 steps instead
of 566244: 2.279 bits per byte of held-out text (2.97 for single tokens' frequencies), MaxVio 0.26.
"""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from moejax.config import frozendict, to_config_dict
from moejax.data.sources import DataConfig
from moejax.families.openpangu_ultra_moe import OPENPANGU_ULTRA_MOE
from moejax.model.config import InitConfig
from moejax.model.cross_entropy import LossConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.sharding.mesh import MeshConfig
from moejax.train.experiment.config import EvalConfig, ExperimentConfig
from moejax.train.optimizer import OptimConfig

TOKENS = 19e12  # of the whole run


def full() -> ExperimentConfig:
  """The published size."""
  batch_size, seq_len = 8192, 4096
  return ExperimentConfig(
    steps=round(TOKENS / (batch_size * seq_len)),
    batch_size=batch_size,
    seq_len=seq_len,
    micro_batches=16,
    workdir='runs/openpangu_ultra_moe',
    data=DataConfig(source='text', path='text/**/*.jsonl.gz', tokenizer='text/tokenizer.json'),
    model=dataclasses.replace(
      OPENPANGU_ULTRA_MOE.presets['full'],
      dtype='bfloat16',
      remat='full',
      init=InitConfig(rule='tiny', embed_std=0.5, attention_gain=0.283, ffn_gain=0.432),
    ),
    loss=LossConfig(mtp_coef='0.3'),
    # A group is the rows that 8 devices of the expert axis share in a micro-batch.
    balance=BalanceConfig(losses=frozendict(ep_group='0.1, 0.01@10%, 0.001@70%'), ep_groups=1024),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=2000, schedule='cosine'),
    mesh=MeshConfig(data=1, fsdp=64, expert=8),
    eval=EvalConfig(every=1000, batches=16),
  )


def tiny() -> ExperimentConfig:
  """Every part of the full run in small."""
  big = full()
  attention, moe = big.model.attention, big.model.moe
  return dataclasses.replace(
    big,
    steps=120,
    batch_size=8,
    seq_len=256,
    micro_batches=1,
    workdir='runs/openpangu_ultra_moe_tiny',
    data=DataConfig(tokenizer='bpe:2048'),
    model=dataclasses.replace(
      big.model,
      vocab_size=0,
      d_model=128,
      num_layers=3,
      num_dense_layers=1,
      d_ff=384,
      dtype='float32',
      remat='none',
      attention=dataclasses.replace(
        attention,
        num_heads=4,
        num_kv_heads=4,
        d_head=32,
        latent=dataclasses.replace(attention.latent, kv_rank=64, q_rank=96, d_rope=16, d_value=32),
      ),
      moe=dataclasses.replace(
        moe, d_expert=64, router=dataclasses.replace(moe.router, num_experts=16, top_k=4)
      ),
    ),
    balance=BalanceConfig(losses=frozendict(ep_group='1, 0.1@10%, 0.01@70%'), ep_groups=2),
    optim=dataclasses.replace(big.optim, learning_rate=4e-3, warmup_steps=20),
    mesh=MeshConfig(),
    eval=EvalConfig(every=60, batches=4),
  )


def get_config(variant: Literal['', 'tiny'] = '') -> ConfigDict:
  """The published size, or a tiny one."""
  return to_config_dict(tiny() if variant else full())
