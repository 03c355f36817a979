"""A small language model with experts, on the Python standard library's own sources: anybody's
first run.

  moejax train                                      (or `make train`, which installs first)

Its layers are GLM-4.5's: grouped-query attention, and DeepSeek-V3's router with a shared expert. So
`moejax hf export` writes files that transformers and vLLM load.

Hardware: two CPU cores, 2 GB. 9 M parameters, of which 5 M are active; 2 M tokens, 0.7 of an epoch.
"""

from ml_collections import ConfigDict

from moejax.config import frozendict, to_config_dict
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.balance.config import BalanceConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.train.experiment.config import EvalConfig, ExperimentConfig
from moejax.train.optimizer import OptimConfig


def get_config() -> ConfigDict:
  """Eight experts, top two, and one that is shared; kept even by two means: a bias that follows the
  load, and a sequence-wise balance loss."""
  return to_config_dict(
    ExperimentConfig(
      steps=500,
      batch_size=16,
      seq_len=256,
      workdir='runs/tiny',
      model=ModelConfig(
        d_model=256,
        num_layers=4,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, d_head=64),
        moe=MoEConfig(
          router=RouterConfig(num_experts=8, top_k=2, score_fn='sigmoid'),
          d_expert=224,
          num_shared=1,
        ),
      ),
      balance=BalanceConfig(losses=frozendict(sequence='0.01'), bias_rule='sign'),
      optim=OptimConfig(learning_rate=2e-3, warmup_steps=40),
      eval=EvalConfig(every=100, batches=8),
    )
  )
