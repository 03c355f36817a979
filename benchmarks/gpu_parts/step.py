"""A whole training step of OLMoE, with fewer layers, in bfloat16: tokens a second, MFU, memory.

Beside it the same model in torch and transformers, if they and a GPU of theirs are there: bfloat16
products on float32 parameters, checkpointed layers, grouped matmuls, AdamW fused.
"""

import dataclasses
import functools
import importlib.util
import statistics
import time

import jax
import numpy as np

from benchmarks.gpu_parts.timing import say
from moejax.data.batch import make_batch
from moejax.families.olmoe import FULL, TINY
from moejax.runtime.chips import peak_flops
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters, flops_per_token
from moejax.train.step.train_state import init_state
from moejax.train.step.train_step import compile_step

LAYERS, ROWS, LENGTH, STEPS = 4, 4, 4096, 10


def config(quick: bool) -> ExperimentConfig:
  """OLMoE's layers, four of its sixteen; or the smallest model."""
  if quick:
    return ExperimentConfig(batch_size=2, seq_len=16, model=dataclasses.replace(TINY, num_layers=1))
  model = dataclasses.replace(FULL, num_layers=LAYERS, dtype='bfloat16', remat='full')
  return ExperimentConfig(batch_size=ROWS, seq_len=LENGTH, model=model)


def main(quick: bool) -> None:
  """Prints a line for ours and, where it can be had, one for torch's."""
  ours(quick)
  if all(importlib.util.find_spec(name) for name in ('torch', 'transformers')):
    torchs()


def ours(quick: bool) -> None:
  """Measures the step as the trainer compiles it."""
  cfg = config(quick)
  shape = cfg.batch_size, cfg.seq_len + 1
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, dtype=np.int32)
  batch = jax.device_put(make_batch(tokens[:, :-1], tokens[:, 1:]))
  state = jax.jit(functools.partial(init_state, cfg))()
  parameters = count_parameters(state.model, cfg)
  program = compile_step(cfg, state, batch)
  taken = []
  for _ in range(3 if quick else STEPS + 2):
    start = time.perf_counter()
    state, metrics = jax.block_until_ready(program(state, batch))
    taken.append(time.perf_counter() - start)
  assert np.isfinite(metrics['loss'])
  took = statistics.median(taken[2:])
  per_second = cfg.batch_size * cfg.seq_len / took
  device = jax.local_devices()[0]
  told = f'{parameters.total / 1e9:.3g} G parameters, {per_second:.4g} tokens/s'
  rating = peak_flops(device.device_kind)
  if rating:
    told += f', MFU {per_second * flops_per_token(parameters, cfg) / rating:.1%}'
  memory = device.memory_stats()
  if memory:
    told += f', {memory["peak_bytes_in_use"] / 2**30:.3g} GiB at most'
  say(f'step      OLMoE, {cfg.model.num_layers} layers, {cfg.batch_size} x {cfg.seq_len}: {told}')


def torchs() -> None:
  """Measures transformers' model; nothing where torch sees no GPU."""
  import torch
  from transformers import OlmoeConfig, OlmoeForCausalLM

  if not torch.cuda.is_available():
    return
  jax.clear_caches()
  torch.manual_seed(0)
  config = OlmoeConfig(
    num_hidden_layers=LAYERS,
    vocab_size=FULL.vocab_size,
    use_cache=False,
    output_router_logits=True,
    attn_implementation='sdpa',
    experts_implementation='grouped_mm',
  )
  with torch.device('cuda'):
    model = OlmoeForCausalLM(config).train()
  model.gradient_checkpointing_enable()
  adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  tokens = torch.randint(0, FULL.vocab_size, (ROWS, LENGTH), device='cuda')
  taken = []
  for _ in range(STEPS + 2):
    torch.cuda.synchronize()
    start = time.perf_counter()
    adamw.zero_grad(set_to_none=True)
    with torch.autocast('cuda', dtype=torch.bfloat16):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adamw.step()
    torch.cuda.synchronize()
    taken.append(time.perf_counter() - start)
  per_second = ROWS * LENGTH / statistics.median(taken[2:])
  peak = torch.cuda.max_memory_allocated() / 2**30
  say(f'step      torch {torch.__version__}: {per_second:.4g} tokens/s, {peak:.3g} GiB at most')
