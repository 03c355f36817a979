"""Tiny models with random weights, openPangu's among them, and the published names of tensors."""

import dataclasses
import math

import numpy as np
import torch
import transformers as hf
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Family:
  """One checkpoint to make.

  Published names of an expert's three matrices: () says that the file has them fused.
  """

  model: str  # a class of transformers, or of LOCAL
  config: dict[str, object]
  score: str = (
    ''  # row of routers.SCORES: what top-k chooses by, before the bias; '' for a dense model
  )
  group: str = ''  # row of routers.GROUPS; '' has no groups
  experts: tuple[str, ...] = ('gate_proj', 'up_proj', 'down_proj')
  moe: str = 'mlp'  # what the hub calls the MoE of a layer
  gains: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # part of a name -> times the usual size
  mistakes: dict[str, dict[str, object]] = dataclasses.field(
    default_factory=dict
  )  # name -> config of one who errs
  silenced: dict[str, float] = dataclasses.field(
    default_factory=dict
  )  # part of a name -> value that switches it off
  names: dict[str, str] = dataclasses.field(
    default_factory=dict
  )  # key of transformers -> key in this config.json
  hub: dict[str, object] = dataclasses.field(
    default_factory=dict
  )  # keys that transformers does not write
  mtp_depth: int = 0
  shard_size: str = '1GB'
  learning_rate: float = 3e-3


class SandwichLayer(deepseek.DeepseekV3DecoderLayer):
  """openPangu's layer: DeepSeek's attention and MLP, each between two norms.

  `post_attention_layernorm` keeps DeepSeek's name but not its place: it norms what attention
  returns.
  """

  def __init__(self, config: hf.PreTrainedConfig, layer_idx: int) -> None:
    super().__init__(config, layer_idx)
    self.pre_mlp_layernorm = deepseek.DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.post_mlp_layernorm = deepseek.DeepseekV3RMSNorm(config.hidden_size, config.rms_norm_eps)
    for norm in (self.self_attn.q_a_layernorm, self.self_attn.kv_a_layernorm):
      norm.variance_epsilon = config.rms_norm_eps
    if isinstance(
      self.mlp, deepseek.DeepseekV3MoE
    ):  # its router has no bias: zero, and not in the checkpoint
      bias = self.mlp.gate.e_score_correction_bias
      self.mlp.gate.register_buffer(
        'e_score_correction_bias', torch.zeros_like(bias), persistent=False
      )

  def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + self.post_attention_layernorm(attended)
    return hidden_states + self.post_mlp_layernorm(self.mlp(self.pre_mlp_layernorm(hidden_states)))


class PanguUltraMoEForCausalLM(hf.DeepseekV3ForCausalLM):
  """openPangu Ultra MoE, which transformers does not have, out of transformers' DeepSeek-V3."""

  def __init__(self, config: hf.PreTrainedConfig) -> None:
    super().__init__(config)
    self.model.layers = nn.ModuleList(
      [SandwichLayer(config, i) for i in range(config.num_hidden_layers)]
    )


LOCAL = {'PanguUltraMoEForCausalLM': PanguUltraMoEForCausalLM}


def build(family: Family, changes: dict[str, object]) -> nn.Module:
  """The family's model, with `changes`, in float32, its experts and attention in plain torch.

  latent_norm_eps is no config of transformers: 1e-6 is the default of its class, and a change of it
  is made here.
  """
  cls = LOCAL[family.model] if family.model in LOCAL else getattr(hf, family.model)
  # transformers completes the nested tables in place: each model has its own
  fields = {k: dict(v) if isinstance(v, dict) else v for k, v in (family.config | changes).items()}
  config = cls.config_class(**fields, attn_implementation='eager')
  config._experts_implementation = 'eager'
  model = cls(config).float().eval()
  for name, norm in model.named_modules():
    if name.endswith('_a_layernorm') and 'latent_norm_eps' in changes:
      norm.variance_epsilon = changes['latent_norm_eps']
  return model


@torch.no_grad()
def randomise(model: nn.Module, family: Family, rng: np.random.Generator) -> None:
  """All parameters at random: norms around one, biases around zero, matrices that keep sizes."""
  biases = [(n, b) for n, b in model.state_dict().items() if n.endswith('e_score_correction_bias')]
  for name, x in [*model.named_parameters(), *biases]:
    noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32))
    gain = math.prod(g for part, g in family.gains.items() if part in name)
    if x.ndim == 1 and 'norm' in name:
      x.copy_(1 + 0.2 * noise)
    elif x.ndim == 1 or name.endswith('_bias'):
      x.copy_(noise * gain * 0.3)
    else:
      fan_in = x.shape[-2] if x.ndim == 3 and not family.experts else x.shape[-1]
      # sharper at the end of a path, where it costs no accuracy: clear choices, clear logits
      size = 1.5 if name.endswith(('lm_head.weight', '.gate.weight', '.router.weight')) else 1.0
      x.copy_(noise * gain * (1.0 if 'embed_tokens' in name else size * fan_in**-0.5))


def published(tensors: Tensors, family: Family) -> Tensors:
  """Names and experts as the hub has them: one matrix [out, in] an expert, unless files fuse too.

  Gradients and final parameters pass through here as well as weights: all are elementwise in them.
  """
  if not family.experts:
    return dict(tensors)
  out = {}
  for name, x in tensors.items():
    stem = name.replace('.mlp.', f'.{family.moe}.')
    if name.endswith('.experts.gate_up_proj'):
      gate, up = x.chunk(2, 1)
      parts = zip(family.experts, (gate, up))
    elif name.endswith('.experts.down_proj'):
      parts = zip(family.experts[2:], (x,))
    else:
      out[stem] = x
      continue
    stem = stem.rpartition('.')[0]
    out |= {f'{stem}.{e}.{part}.weight': y for part, stack in parts for e, y in enumerate(stack)}
  return out


def state(model: nn.Module, family: Family) -> Tensors:
  """What the checkpoint holds of the main model; a tied head is not in it."""
  tied = {'lm_head.weight'} if model.config.tie_word_embeddings else set()
  return published({k: v.detach() for k, v in model.state_dict().items() if k not in tied}, family)


def gradients(model: nn.Module, family: Family) -> Tensors:
  """Gradients of all parameters that have one, under published names."""
  return published({k: p.grad for k, p in model.named_parameters() if p.grad is not None}, family)
