"""Multi-token prediction on top of a main model, as transformers' MtpModel has it.

It is run with padding and gradients.

Block k at row i takes the hidden state of row i (after the final norm; of block k-1 after its norm)
and the embedding of token i+k+1, attends as the main model does, and predicts token i+k+2 through
the main model's head. MtpModel masks no padding and keeps only the last row's logits, so its layers
are run here; they are its layers.
"""

import torch
import torch.nn.functional as F
from models import Family, Tensors, published
from torch import nn
from transformers.modeling_layers import MtpModel


def build_mtp(model: nn.Module, depth: int) -> MtpModel:
  """transformers' blocks for `model`, sharing its embedding, head and rotary tables."""
  return MtpModel(model, depth).float().eval()


def mtp_logits(
  model: nn.Module, mtp: MtpModel, tokens: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
  """Block k's logits [B, S-1-k, V].

  Rows whose own token or whose next k+1 tokens are padding mean nothing.
  """
  hidden = model.model(tokens, attention_mask=mask).last_hidden_state
  out = []
  for k, layer in enumerate(mtp.layers):
    rows = tokens.shape[1] - 1 - k
    positions = torch.arange(rows)[None]
    causal = torch.ones(rows, rows).tril().bool() & mask[:, None, None, :rows].bool()
    # -1e30 and not -inf: a row of padding before the first token sees nothing at all
    hidden = layer(
      model.model.embed_tokens(tokens[:, k + 1 :]),
      hidden[:, :rows],
      position_embeddings=model.model.rotary_emb(hidden, positions),
      position_ids=positions,
      attention_mask=torch.where(causal, 0.0, -1e30),
      past_key_values=None,
    )
    out.append(model.lm_head(hidden))
  return out


def mtp_loss(logits: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
  """Mean over depths of the mean over rows that have a target: the MTP loss with lambda 1."""
  pairs = [(x[:, :-1], tokens[:, k + 2 :]) for k, x in enumerate(logits)]
  return torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in pairs]).mean()


def mtp_names(tensors: Tensors, model: nn.Module, family: Family) -> Tensors:
  """The blocks' tensors under published names: layers after the last, with embedding and head."""
  first = model.config.num_hidden_layers
  out = {}
  for name, x in published(tensors, family).items():
    if not name.startswith('layers.'):
      continue  # embedding and head of the main model
    _, k, rest = name.split('.', 2)
    rest = rest.removeprefix('mtp_block.').replace('post_norm.', 'shared_head.norm.')
    out[f'model.layers.{first + int(k)}.{rest}'] = x
  return out


def mtp_state(model: nn.Module, mtp: MtpModel, family: Family) -> Tensors:
  """What the checkpoint holds of the blocks, the two copies that published files have included."""
  out = mtp_names({k: v.detach() for k, v in mtp.state_dict().items()}, model, family)
  first = model.config.num_hidden_layers
  for layer in range(first, first + len(mtp.layers)):
    out[f'model.layers.{layer}.embed_tokens.weight'] = (
      model.model.embed_tokens.weight.detach().clone()
    )
    out[f'model.layers.{layer}.shared_head.head.weight'] = model.lm_head.weight.detach().clone()
  return out
