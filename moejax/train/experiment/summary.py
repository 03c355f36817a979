"""What a run will be, before it is paid for: parameters, FLOPs, memory, data."""

import dataclasses
import importlib.metadata
import platform

import optax
from jax.sharding import Mesh

from moejax.data.pipeline import Data
from moejax.model.transformer import Transformer
from moejax.moe.layer import causality
from moejax.runtime.units import human
from moejax.sharding.params import bytes_on_device
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters, exchange_summary, flops_per_token

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'numpy')


def summarise(
  cfg: ExperimentConfig,
  model: Transformer,
  opt_state: optax.OptState,
  mesh: Mesh,
  data: Data,
  temporaries: int,
) -> dict[str, object]:
  """What summary.json holds.

  `model` and `opt_state` may be of ShapeDtypeStructs; `temporaries` are the bytes that the compiled step needs beside
  its arguments, as the compiler says.
  """
  parameters = count_parameters(model, cfg)
  tokens = cfg.steps * cfg.batch_size * cfg.seq_len
  exchange, moved = exchange_summary(cfg, mesh.abstract_mesh)
  model_bytes, optimizer_bytes = (bytes_on_device(tree, mesh) for tree in (model, opt_state))
  return {
    'parameters': dataclasses.asdict(parameters),
    'flops_per_token': flops_per_token(parameters, cfg),
    'tokens': tokens,
    'tokens_per_active_parameter': tokens / parameters.active,
    'memory_per_device_bytes': {
      'parameters': model_bytes,
      'optimizer': optimizer_bytes,
      'temporaries': temporaries,
      'all': model_bytes + optimizer_bytes + temporaries,
    },
    'mesh': {name: int(n) for name, n in mesh.shape.items()},
    'devices': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'exchange': {'by': exchange, 'forward_bytes_per_device_and_layer': moved},
    'data': {
      'source': cfg.data.source,
      'tokenizer': data.tokenizer.name,
      'vocab_size': data.vocab_size,
      'train_tokens': data.train_tokens,
      'train_bytes': data.train_bytes,
      'validation_tokens': data.validation_tokens,
      'validation_bytes': data.validation_bytes,
      'epochs': {
        task.task: tokens * task.weight / size.train_tokens
        for task, size in zip(cfg.data.components, data.sizes)
      },
    },
    'causality': causality(cfg.model.moe),
    'versions': {'python': platform.python_version()}
    | {p: importlib.metadata.version(p) for p in PACKAGES},
  }


def lines(summary: dict[str, object], cfg: ExperimentConfig) -> list[str]:
  """The summary for a person."""
  p, m, d = summary['parameters'], summary['memory_per_device_bytes'], summary['data']
  router = cfg.model.moe.router
  return (
    [
      f'model   {human(p["total"])} parameters, {human(p["active"])} active; {cfg.model.num_layers} layers, '
      f'{router.num_experts} experts, top {router.top_k}, {cfg.model.moe.dispatch.dispatcher}',
      f'compute {human(summary["flops_per_token"])}FLOP a token; {human(summary["tokens"])} tokens in {cfg.steps} steps, '
      f'{summary["tokens_per_active_parameter"]:.2f} an active parameter',
      f'memory  {human(m["all"], 1024)}B a device: parameters {human(m["parameters"], 1024)}B, '
      f'optimiser {human(m["optimizer"], 1024)}B, step {human(m["temporaries"], 1024)}B',
      f'devices {summary["devices"]}, mesh '
      + ' x '.join(f'{k} {v}' for k, v in summary['mesh'].items()),
      f'data    {d["source"]}: {human(d["train_bytes"])}B, {human(d["train_tokens"])} tokens of {d["tokenizer"]}, '
      + ', '.join(
        f'{epochs:.2f} epochs' + (f' of {task}' if len(d['epochs']) > 1 else '')
        for task, epochs in d['epochs'].items()
      )
      + f'; {human(d["validation_bytes"])}B held out',
    ]
    + exchange_lines(summary)
    + [f'causal  {line}' for line in summary['causality']]
  )


def exchange_lines(summary: dict[str, object]) -> list[str]:
  """How tokens get to experts on other devices, and what each way would cost; nothing where none are."""
  by, moved = summary['exchange']['by'], summary['exchange']['forward_bytes_per_device_and_layer']
  each = ', '.join(f'{name} {human(number, 1024)}B' for name, number in moved.items())
  return (
    [
      f'experts over {summary["mesh"]["expert"]} devices, exchange by {by}; a layer forward, in and out of each '
      f'device: {each}'
    ]
    if by
    else []
  )
