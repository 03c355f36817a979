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
from moejax.train.experiment.cost import (
  attention_summary,
  count_parameters,
  exchange_summary,
  flops_per_token,
)

# What a run's numbers may depend on, beside moejax itself.
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

  Args:
    model, opt_state: may be of ShapeDtypeStructs.
    mesh: also the one that is set.
    temporaries: bytes that the compiled step needs beside its arguments, as the compiler says.
  """
  parameters = count_parameters(model, cfg)
  tokens = cfg.steps * cfg.batch_size * cfg.seq_len
  exchange, exchanged_bytes = exchange_summary(cfg, mesh.abstract_mesh)
  model_bytes, optimizer_bytes = bytes_on_device(model, mesh), bytes_on_device(opt_state, mesh)
  return {
    'parameters': dataclasses.asdict(parameters),
    'flops_per_token': flops_per_token(parameters, cfg),
    'tokens': tokens,
    'tokens_per_active_parameter': tokens / parameters.active,
    # The step's results need no memory of their own: they take the place of the old state.
    'memory_per_device_bytes': {
      'parameters': model_bytes,
      'optimizer': optimizer_bytes,
      'temporaries': temporaries,
      'all': model_bytes + optimizer_bytes + temporaries,
    },
    'mesh': {name: int(n) for name, n in mesh.shape.items()},
    'devices': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'exchange': {'by': exchange, 'forward_bytes_per_device_and_layer': exchanged_bytes},
    'data': data_summary(cfg, data, tokens),
    'attention': attention_summary(cfg),
    'causality': causality(cfg.model.moe),
    'versions': package_versions(),
  }


def data_summary(cfg: ExperimentConfig, data: Data, tokens: int) -> dict[str, object]:
  """What is known of the text, and how often a run of so many tokens reads each task's."""
  epochs = {}
  for component, size in zip(cfg.data.components, data.sizes):
    epochs[component.task] = tokens * component.weight / size.train_tokens
  return {
    'source': cfg.data.source,
    'tokenizer': data.tokenizer.name,
    'vocab_size': data.vocab_size,
    'train_tokens': data.train_tokens,
    'train_bytes': data.train_bytes,
    'validation_tokens': data.validation_tokens,
    'validation_bytes': data.validation_bytes,
    'epochs': epochs,
  }


def package_versions() -> dict[str, str]:
  """The installed versions of Python and of PACKAGES, by name."""
  installed = {package: importlib.metadata.version(package) for package in PACKAGES}
  return {'python': platform.python_version()} | installed


def summary_lines(summary: dict[str, object], cfg: ExperimentConfig) -> list[str]:
  """The summary for a person, a line a subject."""
  parameters, memory = summary['parameters'], summary['memory_per_device_bytes']
  router, dispatcher = cfg.model.moe.router, cfg.model.moe.dispatch.dispatcher
  mesh = ' x '.join(f'{axis} {size}' for axis, size in summary['mesh'].items())
  return [
    f'model   {human(parameters["total"])} parameters, {human(parameters["active"])} active; '
    f'{cfg.model.num_layers} layers, {router.num_experts} experts, top {router.top_k}, '
    f'{dispatcher}',
    f'compute {human(summary["flops_per_token"])}FLOP a token; {human(summary["tokens"])} tokens '
    f'in {cfg.steps} steps, {summary["tokens_per_active_parameter"]:.2f} an active parameter',
    f'memory  {human(memory["all"], 1024)}B a device: '
    f'parameters {human(memory["parameters"], 1024)}B, '
    f'optimiser {human(memory["optimizer"], 1024)}B, step {human(memory["temporaries"], 1024)}B',
    f'devices {summary["devices"]}, mesh {mesh}, attention {summary["attention"]}',
    data_line(summary['data']),
    *exchange_lines(summary),
    *(f'causal  {line}' for line in summary['causality']),
  ]


def data_line(data: dict[str, object]) -> str:
  """The line of the text; of several tasks it names the epochs of each."""
  several = len(data['epochs']) > 1
  epochs = []
  for task, number in data['epochs'].items():
    of_task = f' of {task}' if several else ''
    epochs.append(f'{number:.2f} epochs{of_task}')
  train_size, held_out = human(data['train_bytes']), human(data['validation_bytes'])
  return (
    f'data    {data["source"]}: {train_size}B, {human(data["train_tokens"])} tokens of '
    f'{data["tokenizer"]}, {", ".join(epochs)}; {held_out}B held out'
  )


def exchange_lines(summary: dict[str, object]) -> list[str]:
  """How tokens get to experts on other devices, and what each way costs; [] where none do."""
  by = summary['exchange']['by']
  if not by:
    return []
  sizes = summary['exchange']['forward_bytes_per_device_and_layer']
  each = ', '.join(f'{name} {human(size, 1024)}B' for name, size in sizes.items())
  return [
    f'experts over {summary["mesh"]["expert"]} devices, exchange by {by}; a layer forward, in and '
    f'out of each device: {each}'
  ]
