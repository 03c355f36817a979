"""Plans: held against what a run takes on the CPU's devices, as a function and as a process."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moejax.config import ConfigError
from moejax.data.sources import DataConfig
from moejax.model.remat import REMAT_POLICIES
from moejax.plan import planner
from moejax.plan.memory_model import memory_by_kind, model_shapes
from moejax.plan.report import CompiledStep, needed_bytes
from moejax.plan.topology import Topology
from moejax.sharding.mesh import make_mesh
from moejax.train.compile import compile_programs
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.initial_state import initial_train_state
from moejax.train.shapes import make_run_mesh, sharded_state_shapes
from tests.plan.eight_devices import CONFIG, CPU_8, SECTIONS, changed, eight_chips
from tests.support.trainer_process import xla_flags

ROOT = Path(__file__).parents[2]
FLAGS = [
  '--config.data.tokenizer=bytes',
  '--config.batch_size=16',
  '--config.seq_len=64',
  '--config.model.d_model=64',
  '--config.model.num_layers=2',
  '--config.model.attention.d_head=16',
]


@pytest.mark.slow
def test_a_plan_is_what_a_run_takes(compiled_step: CompiledStep) -> None:
  """Arguments to the byte, by real arrays; all of it within 15%; a guess from shapes within 30%."""
  before = len(jax.live_arrays())
  mesh = make_run_mesh(CONFIG)
  with jax.set_mesh(mesh):
    real = compile_programs(CONFIG, mesh).train.memory_analysis()
    assert len(jax.live_arrays()) == before, 'nothing is allocated'
    state = initial_train_state(CONFIG, sharded_state_shapes(CONFIG, mesh), mesh)

  def held(tree: object) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  assert compiled_step.memory['parameters'] == held(state.model)
  assert compiled_step.memory['optimiser'] == held(state.opt_state)
  told = (
    compiled_step.memory['parameters']
    + compiled_step.memory['optimiser']
    + compiled_step.memory['batch and rest of the state']
  )
  assert told == real.argument_size_in_bytes
  needed = real.argument_size_in_bytes + real.temp_size_in_bytes
  assert needed_bytes(compiled_step) == pytest.approx(needed, rel=0.15)
  assert sum(memory_by_kind(CONFIG, model_shapes(CONFIG), CPU_8).values()) == pytest.approx(
    needed, rel=0.3
  )


@pytest.mark.slow
@pytest.mark.parametrize('remat', sorted(set(REMAT_POLICIES) - {'full'}))
def test_a_guess_is_near_what_the_compiler_says(remat: str) -> None:
  cfg = changed(remat, 2, data=2, fsdp=2, expert=2)
  found = planner.compile_on(cfg, CPU_8.devices(), CPU_8)
  assert sum(memory_by_kind(cfg, model_shapes(cfg), CPU_8).values()) == pytest.approx(
    needed_bytes(found), rel=0.3
  )


def test_a_second_candidate_is_compiled_where_the_first_does_not_fit(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The compiler wants twice what was guessed beside the state: the first one teaches that."""
  tried: list[float] = []

  def compiled(
    cfg: ExperimentConfig, devices: list[jax.Device], topology: Topology
  ) -> CompiledStep:
    told = memory_by_kind(cfg, model_shapes(cfg), topology)
    more = told['gradients'] + told['activations'] + told['other temporaries']
    tried.append(sum(told.values()) + more)
    return CompiledStep(cfg, make_mesh(cfg.mesh), None, told | {'more': more}, 'text')

  monkeypatch.setattr(planner, 'compile_on', compiled)
  counts = []
  for share in (0.6, 0.8, 1.0, 1.2, 1.5):
    limit = share * sum(memory_by_kind(CONFIG, model_shapes(CONFIG), eight_chips('v5e')).values())
    found = planner.compile_best_fit(CONFIG, CPU_8.devices(), eight_chips('v5e', memory=limit))
    counts.append(len(tried))
    assert needed_bytes(found) == tried[-1] <= limit and all(size > limit for size in tried[:-1])
    tried.clear()
  assert set(counts) <= {1, 2} and 2 in counts


def test_what_a_compiler_refuses_is_told(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  def refuse(*args: object) -> None:
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (231.27G) exceeds '
      'available HBM'
    )

  monkeypatch.setattr(planner, 'compile_step', refuse)
  assert (
    planner.print_plan(
      changed('none', data=8), 'once', eight_chips('v5e', compiler='cpu')._replace(text='cpu:8')
    )
    == 2
  )
  said = capsys.readouterr().out
  assert (
    '231 GiB' in said and 'it does not fit' in said and '--config.model.remat=full: about ' in said
  )


def test_a_vocabulary_that_needs_no_data() -> None:
  def of(tokenizer: str, size: int = 0) -> int:
    model = dataclasses.replace(CONFIG.model, vocab_size=size)
    cfg = dataclasses.replace(CONFIG, model=model, data=DataConfig(tokenizer=tokenizer))
    return planner.with_known_vocabulary(cfg).model.vocab_size

  assert (of('bytes'), of('bpe:2048'), of('some/tokenizer.json', 99)) == (257, 2048, 99)
  with pytest.raises(ConfigError, match='a plan reads no data: give --config.model.vocab_size=N'):
    of('some/tokenizer.json')


def train(*argv: str, **env: str) -> subprocess.CompletedProcess:
  """`train.py` as a process of its own, which then says how many arrays it has."""
  code = (
    f'import sys, train; status = train.main({list(argv)!r}); import jax; '
    'print("arrays", len(jax.live_arrays())); sys.exit(status)'
  )
  # The command adds how many devices it wants, and the last word counts.
  return subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'XLA_FLAGS': xla_flags()} | env,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_a_plan_as_a_process(tmp_path: Path) -> None:
  """On more devices than there are; nothing is allocated, read or written."""
  ran = train(
    '--plan',
    '--topology=cpu:16',
    *FLAGS,
    '--config.mesh.fsdp=4',
    '--config.mesh.expert=4',
    f'--workdir={tmp_path / "run"}',
  )
  assert ran.returncode == 0, ran.stderr
  assert all(
    section in ran.stdout for section in (*SECTIONS, '16 devices', "the CPU's compiler")
  ), ran.stdout
  assert (
    'arrays 0' in ran.stdout
    and 'compiling the step' in ran.stderr
    and not (tmp_path / 'run').exists()
  )
  wrong = train('--plan', '--topology=cpu:16', *FLAGS, '--config.mesh.fsdp=32')
  assert wrong.returncode == 2 and 'but there are 16 devices' in wrong.stderr, wrong.stderr
  assert 'the nearest mesh that would do' in wrong.stderr


@pytest.mark.parametrize(
  ('plugin', 'slice_', 'links_'),
  [
    pytest.param('libtpu', 'v5p:2x2x4', 'ICI', marks=pytest.mark.tpu_aot),
    pytest.param('jax_cuda13_plugin', 'h100:8', 'NVLink', marks=pytest.mark.cuda_aot),
    pytest.param('jax_cuda13_plugin', 'h200:16', 'NVLink', marks=pytest.mark.cuda_aot),
  ],
)
@pytest.mark.slow
def test_a_plan_for_chips(plugin: str, slice_: str, links_: str) -> None:
  if importlib.util.find_spec(plugin) is None:
    pytest.skip(f'{plugin} is not installed')
  ran = train('--plan=fit', f'--topology={slice_}', *FLAGS, '--config.model.dtype=bfloat16')
  assert ran.returncode == 0, ran.stderr
  assert all(section in ran.stdout for section in SECTIONS[:-2]) and 'it fits' in ran.stdout, (
    ran.stdout
  )
  assert (
    'rules:' in ran.stdout
    and 'MFU' in ran.stdout
    and 'CPU' not in ran.stdout
    and 'arrays 0' in ran.stdout
  )
