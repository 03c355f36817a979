"""What a golden holds: logits, combine weights, losses, gradients, AdamW steps, greedy text.

Each part raises Unfit when some choice, of an expert or of a greedy token, is nearer to another one
than the margin, or when something would go untested: an expert that no token chose.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from models import Family, Tensors, gradients, published
from mtp import mtp_logits, mtp_loss, mtp_names
from routers import watching
from torch import nn
from transformers.modeling_layers import MtpModel

BATCH, LENGTH = 2, 14
PADDING = {'': (0, 0), 'left': (5, 2), 'right': (0, 4)}  # case -> tokens of padding of each row
PROMPTS, NEW_TOKENS = (5, 9), 16
STEPS = 6
ADAMW = {'betas': (0.9, 0.95), 'eps': 1e-8, 'weight_decay': 0.1, 'clip_norm': 1.0}
MAX_NOISE = 2e-5
Arrays = dict[str, np.ndarray]


class Unfit(Exception):
  """These weights make no good golden: float noise could decide a choice, or an expert is idle."""


class Gaps(dict[str, float]):
  """The smallest distance of any choice, by the part of the golden that made it."""

  def __init__(self, margin: float) -> None:
    super().__init__()
    self.margin = margin

  def add(self, part: str, gaps: torch.Tensor) -> None:
    """Remembers the smallest of `gaps`, or raises Unfit."""
    smallest = float(gaps.amin()) if gaps.numel() else torch.inf
    if smallest < self.margin:
      raise Unfit(part)
    self[part] = min(smallest, self[part]) if part in self else smallest


def cases(
  vocab_size: int, rng: np.random.Generator
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
  """(case, tokens [B, S], mask [B, S]): rows without padding, pushed right by it, cut short by it.

  What is no padding sees the same tokens in all cases, so each choice needs to be clear but once;
  what stands on padding is a token as any other. The last two of the vocabulary, begin and end of
  sequence, stay out.
  """
  rows = torch.from_numpy(rng.integers(0, vocab_size - 2, (BATCH, LENGTH)))
  place = torch.arange(LENGTH).expand(BATCH, -1)
  for case, padding in PADDING.items():
    n = torch.tensor(padding)[:, None]
    if case == 'left':
      yield case, rows.gather(1, (place - n) % LENGTH), (place >= n).long()
    else:
      mask = place < LENGTH - n
      yield case, torch.where(mask, rows, (rows + 1) % (vocab_size - 2)), mask.long()


def cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
  """Mean over next tokens, of pairs that are both no padding."""
  pairs = (mask[:, :-1] * mask[:, 1:]).bool()
  return F.cross_entropy(logits[:, :-1][pairs], tokens[:, 1:][pairs])


def forward(
  model: nn.Module, family: Family, vocab_size: int, rng: np.random.Generator, gaps: Gaps
) -> Arrays:
  """tokens, mask, logits, combine [L, B, S, E], ce of each case; rows of padding mean nothing."""
  out = {}
  for case, tokens, mask in cases(vocab_size, rng):
    with torch.no_grad(), watching(model, family) as watch:
      logits = model(tokens, attention_mask=mask, use_cache=False).logits
    arrays = {
      'tokens': tokens,
      'mask': mask,
      'logits': logits,
      'ce': cross_entropy(logits, tokens, mask),
    }
    if family.score:
      gaps.add('forward', torch.stack(watch.gap)[:, mask.flatten().bool()])
      arrays['combine'] = torch.stack(watch.combine).unflatten(1, mask.shape)
    out |= {f'{case}_{k}'.strip('_'): v.numpy() for k, v in arrays.items()}
  return out


@torch.no_grad()
def greedy(model: nn.Module, family: Family, tokens: np.ndarray, gaps: Gaps) -> Arrays:
  """Greedy text after prompts of two lengths, each row alone, without cache, padding or stop."""
  rows = []
  for prompt, n in zip(torch.from_numpy(tokens), PROMPTS):
    row = prompt[None, :n]
    for _ in range(NEW_TOKENS):
      with watching(model, family) as watch:
        top = model(row, use_cache=False).logits[0, -1].topk(2)
      gaps.add('greedy tokens', top.values[0] - top.values[1])
      if family.score:
        gaps.add('greedy experts', torch.stack(watch.gap))
      row = torch.cat([row, top.indices[None, :1]], 1)
    rows.append(row[0, n:])
  text = torch.stack(rows)
  if (text == model.config.eos_token_id).any():
    raise Unfit('greedy text has the end of sequence')
  return {'greedy_lengths': np.array(PROMPTS), 'greedy_tokens': text.numpy()}


def numpy(tensors: Tensors) -> Arrays:
  """Copies, so that a later step cannot write to them."""
  return {k: x.detach().numpy().copy() for k, x in tensors.items()}


def main_loss(model: nn.Module, tokens: np.ndarray) -> torch.Tensor:
  """Cross entropy of the case without padding."""
  x = torch.from_numpy(tokens)
  return cross_entropy(model(x, use_cache=False).logits, x, torch.ones_like(x))


def loss_gradients(model: nn.Module, family: Family, tokens: np.ndarray) -> Arrays:
  """Gradients of the cross entropy by all parameters, under published names."""
  model.zero_grad()
  main_loss(model, tokens).backward()
  return moved(gradients(model, family))


def moved(grads: Tensors) -> Arrays:
  """The gradients, if there is none that is zero everywhere."""
  for name, grad in grads.items():
    if not grad.any():
      raise Unfit(f'no token reaches {name}')
  return numpy(grads)


def steps(model: nn.Module, family: Family, tokens: np.ndarray, gaps: Gaps) -> Arrays:
  """Losses before each of six AdamW steps on one batch, norms before clipping, last parameters."""
  model = copy.deepcopy(model)
  named = dict(model.named_parameters())
  decayed = [
    p for n, p in named.items() if p.ndim > 1 and not n.endswith('_bias')
  ]  # matrices; no vector, of any stack
  rest = [p for n, p in named.items() if p.ndim == 1 or n.endswith('_bias')]
  groups = [
    {'params': decayed, 'weight_decay': ADAMW['weight_decay']},
    {'params': rest, 'weight_decay': 0.0},
  ]
  optimiser = torch.optim.AdamW(
    groups, lr=family.learning_rate, betas=ADAMW['betas'], eps=ADAMW['eps']
  )
  losses, norms = [], []
  for _ in range(STEPS):
    optimiser.zero_grad()
    with watching(model, family) as watch:
      loss = main_loss(model, tokens)
    if family.score:
      gaps.add('steps', torch.stack(watch.gap))
    loss.backward()
    norms.append(nn.utils.clip_grad_norm_(named.values(), ADAMW['clip_norm']).item())
    optimiser.step()
    losses.append(loss.item())
  final = numpy(published(named, family))
  return {'losses': np.array(losses), 'grad_norms': np.array(norms)} | {
    f'param/{k}': v for k, v in final.items()
  }


def multi_token(
  model: nn.Module, mtp: MtpModel, family: Family, golden: Arrays, gaps: Gaps
) -> Arrays:
  """Logits, combine weights and loss of the MTP blocks, and its gradients by all parameters."""
  out = {}
  for case in PADDING:
    tokens, mask = (torch.from_numpy(golden[f'{case}_{k}'.strip('_')]) for k in ('tokens', 'mask'))
    with torch.no_grad(), watching(mtp, family) as watch:
      logits = mtp_logits(model, mtp, tokens, mask)
    for k, x in enumerate(logits):
      valid = (mask[:, : -1 - k] * mask[:, k + 1 :]).bool()
      gaps.add('mtp', watch.gap[k][valid.flatten()])
      arrays = {'logits': x, 'combine': watch.combine[k].unflatten(0, valid.shape)}
      out |= {f'{case}_{name}_{k}'.strip('_'): v.numpy() for name, v in arrays.items()}
  model.zero_grad()
  mtp.zero_grad()
  tokens = torch.from_numpy(golden['tokens'])
  loss = mtp_loss(mtp_logits(model, mtp, tokens, torch.ones_like(tokens)), tokens)
  loss.backward()
  own = {k: p.grad for k, p in mtp.named_parameters() if p.grad is not None}
  grads = gradients(model, family) | mtp_names(own, model, family)
  return out | {'loss': loss.detach().numpy()} | {f'grad/{k}': v for k, v in moved(grads).items()}


def noise(model: nn.Module, family: Family, files: dict[str, Arrays]) -> dict[str, float]:
  """How far results move, at most, when every parameter does by 1e-7 of itself.

  No other code can agree better.

  Gradients are relative to the largest of their own tensor. Unfit if it is more than MAX_NOISE.
  """
  model = copy.deepcopy(model)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in model.parameters():
      p.mul_(1 + 1e-7 * torch.randn(p.shape, generator=generator))
    tokens = files['golden.npz']['tokens']
    logits = model(torch.from_numpy(tokens), use_cache=False).logits.numpy()
  grads, after = loss_gradients(model, family, tokens), steps(model, family, tokens, Gaps(0.0))
  change = {k: float(np.abs(x - after[k]).max()) for k, x in files['steps.npz'].items()}
  out = {
    'logits': float(np.abs(logits - files['golden.npz']['logits']).max()),
    'gradients': max(
      float(np.abs(grads[k] - x).max() / np.abs(x).max()) for k, x in files['grads.npz'].items()
    ),
    'losses of steps': change['losses'],
    'parameters after steps': max(x for k, x in change.items() if k.startswith('param/')),
  }
  if max(out.values()) > MAX_NOISE:
    raise Unfit('noise')
  return out
