"""What each field of a ModelConfig decides, in one table, for whoever compares two configs.

A checkpoint that goes on, a model that another run starts from and a published config.json each ask
for other roles. A new field must be given a role: a test holds the table against ModelConfig.
"""

from moejax.config.fields import is_under, walk_fields
from moejax.model.config import ModelConfig

# role -> fields, or sections that stand for all of their fields
FIELD_ROLES: dict[str, tuple[str, ...]] = {
  # what given weights compute
  'function': (
    'vocab_size',
    'd_model',
    'num_layers',
    'num_dense_layers',
    'ffn_pattern',
    'd_ff',
    'attention.num_heads',
    'attention.num_kv_heads',
    'attention.d_head',
    'attention.rope',
    'attention.windows',
    'attention.qk_norm',
    'attention.qkv_bias',
    'attention.out_bias',
    'attention.clip_qkv',
    'attention.sinks',
    'attention.latent',
    'moe.router.num_experts',
    'moe.router.top_k',
    'moe.router.score_fn',
    'moe.router.num_groups',
    'moe.router.top_groups',
    'moe.router.renormalise',
    'moe.router.scale',
    'moe.router.weigh',
    'moe.router.group_best',
    'moe.router.selection',
    'moe.router.noisy',
    'moe.router.logit_bias',
    'moe.d_expert',
    'moe.num_shared',
    'moe.d_shared',
    'moe.shared_gate',
    'moe.activation',
    'moe.activation_limit',
    'moe.expert_bias',
    'norm_eps',
    'tie_embeddings',
    'sandwich_norm',
    'mtp_depth',
  ),
  # what is random in training only
  'training': ('moe.router.jitter', 'moe.router.expert_dropout', 'moe.router.random_second'),
  # in which dtype it is computed
  'precision': ('dtype',),
  # how parameters start
  'start': ('init',),
  # how it runs: on what, how fast, in how much memory
  'execution': ('attention.implementation', 'moe.dispatch', 'remat', 'unroll'),
}


def fields_with_role(cfg: ModelConfig, *roles: str) -> dict[str, object]:
  """Dotted path -> value of the fields that have one of these roles, in the order of the config."""
  sections = [section for role in roles for section in FIELD_ROLES[role]]
  return {path: value for path, value in walk_fields(cfg) if is_under(path, sections)}
