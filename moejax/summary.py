"""What a run will be, before it is paid for: parameters, FLOPs, memory, data."""

import dataclasses
import importlib.metadata
import math
import platform

import jax
from jax.sharding import Mesh, NamedSharding

from moejax.cost import count_parameters, exchanged, flops_per_token
from moejax.data import Data
from moejax.experiment import ExperimentConfig
from moejax.moe.layer import causality
from moejax.sharding import is_param, param_spec
from moejax.state import TrainState

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'numpy')


def bytes_on_device(tree: object, mesh: Mesh) -> int:
  """Of a state's arrays on one device, under the table of shardings."""

  def of(node: object) -> int:
    sharding = NamedSharding(mesh, param_spec(node)) if is_param(node) else None
    return sum(math.prod(sharding.shard_shape(leaf.shape) if sharding else leaf.shape) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(node))

  return sum(of(node) for node in jax.tree.leaves(tree, is_leaf=is_param))


def summarise(cfg: ExperimentConfig, state: TrainState, mesh: Mesh, data: Data, temporaries: int) -> dict[str, object]:
  """summary.json. `state` may be of ShapeDtypeStructs; `temporaries` is the compiler's word on the compiled step."""
  parameters = count_parameters(state.model, cfg)
  tokens = cfg.steps * cfg.batch_size * cfg.seq_len
  exchange, moved = exchanged(cfg, mesh.abstract_mesh)
  model_bytes, optimizer_bytes = (bytes_on_device(tree, mesh) for tree in (state.model, state.opt_state))
  return {
    'parameters': dataclasses.asdict(parameters),
    'flops_per_token': flops_per_token(parameters, cfg),
    'tokens': tokens,
    'tokens_per_active_parameter': tokens / parameters.active,
    'memory_per_device_bytes': {
      'parameters': model_bytes, 'optimizer': optimizer_bytes, 'temporaries': temporaries,
      'all': model_bytes + optimizer_bytes + temporaries},
    'mesh': {name: int(n) for name, n in mesh.shape.items()},
    'devices': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'exchange': {'by': exchange, 'forward_bytes_per_device_and_layer': moved},
    'data': {
      'source': cfg.data.source, 'tokenizer': data.tokenizer.name, 'vocab_size': data.vocab_size,
      'train_tokens': data.train_tokens, 'train_bytes': data.train_bytes,
      'validation_tokens': data.validation_tokens, 'validation_bytes': data.validation_bytes,
      'epochs': {task.task: tokens * task.weight / size.train_tokens
                 for task, size in zip(cfg.data.components, data.sizes)}},
    'causality': causality(cfg.model.moe),
    'versions': {'python': platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
  }


def lines(summary: dict[str, object], cfg: ExperimentConfig) -> list[str]:
  """The summary for a person."""
  p, m, d = summary['parameters'], summary['memory_per_device_bytes'], summary['data']
  router = cfg.model.moe.router
  return [
    f'model   {human(p["total"])} parameters, {human(p["active"])} active; {cfg.model.num_layers} layers, '
    f'{router.num_experts} experts, top {router.top_k}, {cfg.model.moe.dispatch.dispatcher}',
    f'compute {human(summary["flops_per_token"])}FLOP a token; {human(summary["tokens"])} tokens in {cfg.steps} steps, '
    f'{summary["tokens_per_active_parameter"]:.2f} an active parameter',
    f'memory  {human(m["all"], 1024)}B a device: parameters {human(m["parameters"], 1024)}B, '
    f'optimiser {human(m["optimizer"], 1024)}B, step {human(m["temporaries"], 1024)}B',
    f'devices {summary["devices"]}, mesh ' + ' x '.join(f'{k} {v}' for k, v in summary['mesh'].items()),
    f'data    {d["source"]}: {human(d["train_bytes"])}B, {human(d["train_tokens"])} tokens of {d["tokenizer"]}, '
    + ', '.join(f'{epochs:.2f} epochs' + (f' of {task}' if len(d['epochs']) > 1 else '')
                for task, epochs in d['epochs'].items()) + f'; {human(d["validation_bytes"])}B held out',
  ] + exchange_lines(summary) + [f'causal  {line}' for line in summary['causality']]


def exchange_lines(summary: dict[str, object]) -> list[str]:
  """How tokens get to experts on other devices, and what each way would cost; nothing where none are."""
  by, moved = summary['exchange']['by'], summary['exchange']['forward_bytes_per_device_and_layer']
  each = ', '.join(f'{name} {human(number, 1024)}B' for name, number in moved.items())
  return [f'experts over {summary["mesh"]["expert"]} devices, exchange by {by}; a layer forward, in and out of each '
          f'device: {each}'] if by else []


def human(number: float, base: int = 1000) -> str:
  """12_345_678 -> '12.3 M'; with base 1024, '11.8 Mi'."""
  for unit in ('', 'k', 'M', 'G', 'T', 'P'):
    if abs(number) < base or unit == 'P':
      break
    number /= base
  return f'{number:.3g} {unit}{"i" if base == 1024 and unit else ""}'
