"""Plans: held against what a run takes on the devices that are here; what is refused, and what would help."""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data.sources import DataConfig
from moejax.model.config import AttentionConfig, ModelConfig
from moejax.moe.layer import MoEConfig
from moejax.moe.routing import RouterConfig
from moejax.plan import planner as plan
from moejax.plan import report as planned
from moejax.plan.hlo.collectives import Collective
from moejax.plan.memory_model import memory, shapes
from moejax.plan.roofline import Bound, least_time, links, mfu_ceiling, step_flops, time_bounds
from moejax.plan.search import candidates, layout_variants
from moejax.plan.topology import Topology, parse_topology, read_plan_flags
from moejax.runtime.chips import CHIPS
from moejax.sharding.mesh import MeshConfig, make_mesh
from moejax.sharding.params import bytes_on_device
from moejax.train.compile import compile_programs
from moejax.train.experiment.config import ExperimentConfig
from moejax.train.experiment.cost import count_parameters, flops_per_token
from moejax.train.initial_state import initial_train_state
from moejax.train.shapes import make_run_mesh, sharded_state_shapes

ROOT = Path(__file__).parents[2]
HERE = parse_topology('cpu:8')
CONFIG = ExperimentConfig(
  seq_len=128,
  batch_size=32,
  mesh=MeshConfig(1, 2, 4),
  model=ModelConfig(
    vocab_size=512,
    d_model=128,
    num_layers=4,
    remat='full',
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, d_head=32),
    moe=MoEConfig(RouterConfig(8, 2), d_expert=128),
  ),
)
FLAGS = [
  '--config.data.tokenizer=bytes',
  '--config.batch_size=16',
  '--config.seq_len=64',
  '--config.model.d_model=64',
  '--config.model.num_layers=2',
  '--config.model.attention.d_head=16',
]
SECTIONS = (
  'parameters',
  'active',
  'FLOP a token',
  'optimiser',
  'gradients',
  'activations',
  'other temporaries',
  'collectives of one step',
  'all-gather',
  'fsdp',
)


def changed(remat: str = 'full', micro_batches: int = 1, **mesh: int) -> ExperimentConfig:
  """CONFIG with another plan."""
  return dataclasses.replace(
    CONFIG,
    mesh=MeshConfig(**mesh),
    micro_batches=micro_batches,
    model=dataclasses.replace(CONFIG.model, remat=remat),
  )


@pytest.fixture(scope='module')
def done() -> planned.Compiled:
  """CONFIG on the devices that are here."""
  return plan.compiled(CONFIG, HERE.devices(), HERE)


def on(name: str, compiler: str = 'cpu', **limits: float) -> Topology:
  """Eight devices of a chip, which the CPU's stand in for."""
  return parse_topology('v5e:2x4')._replace(chip=CHIPS[name]._replace(**limits), compiler=compiler)


@pytest.mark.slow
def test_a_plan_is_what_a_run_takes(done: planned.Compiled) -> None:
  """Arguments to the byte, by arrays that are there; all of it within 15%; a guess from shapes within 30%."""
  before = len(jax.live_arrays())
  mesh = make_run_mesh(CONFIG)
  with jax.set_mesh(mesh):
    real = compile_programs(CONFIG, mesh).train.memory_analysis()
    assert len(jax.live_arrays()) == before, 'nothing is allocated'
    state = initial_train_state(CONFIG, sharded_state_shapes(CONFIG, mesh), mesh)

  def held(tree: object) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  assert done.memory['parameters'] == held(state.model)
  assert done.memory['optimiser'] == held(state.opt_state)
  told = (
    done.memory['parameters']
    + done.memory['optimiser']
    + done.memory['batch and rest of the state']
  )
  assert told == real.argument_size_in_bytes
  needed = real.argument_size_in_bytes + real.temp_size_in_bytes
  assert planned.total(done) == pytest.approx(needed, rel=0.15)
  assert sum(memory(CONFIG, shapes(CONFIG), HERE).values()) == pytest.approx(needed, rel=0.3)


@pytest.mark.slow
def test_a_guess_is_near_what_the_compiler_says() -> None:
  cfg = changed('dots', 2, data=2, fsdp=2, expert=2)
  found = plan.compiled(cfg, HERE.devices(), HERE)
  assert sum(memory(cfg, shapes(cfg), HERE).values()) == pytest.approx(
    planned.total(found), rel=0.3
  )


def test_guessed_parameters_are_those_of_the_mesh() -> None:
  model = shapes(CONFIG).model
  for cfg in (
    changed(data=8),
    changed(data=1, fsdp=8),
    changed(data=1, fsdp=2, expert=2, tensor=2),
  ):
    size = bytes_on_device(model, make_mesh(cfg.mesh))
    told = memory(cfg, shapes(cfg), HERE)
    assert (told['parameters'], told['optimiser'], told['gradients']) == (size, 2 * size, size)
  assert memory(changed(data=8, micro_batches=2), shapes(CONFIG), HERE)[
    'gradients'
  ] == 2 * bytes_on_device(model, make_mesh(MeshConfig())), 'the sum so far, and what is added'


def test_candidates_divide_the_run_and_should_fit() -> None:
  found = list(layout_variants(CONFIG, 8))
  assert {cfg.model.remat for cfg in found} == {'full', 'dots', 'none'}
  assert max(cfg.micro_batches for cfg in found) == 16, (
    'a row on each of the two shards of fsdp 2 x tensor 4'
  )
  assert len({cfg.mesh for cfg in found}) == 19, 'of 20 meshes tensor 8 does not divide four heads'
  for cfg in found[::60]:
    make_run_mesh(cfg)
  needs = sorted(sum(memory(cfg, shapes(cfg), on('v5e')).values()) for cfg in found)
  some = on('v5e', memory=needs[len(needs) // 2])
  best = candidates(CONFIG, HERE.devices(), some)
  assert 0 < len(best) < len(found) / 2
  assert all(sum(one.memory.values()) <= some.chip.memory for one in best)
  assert [one.seconds for one in best] == sorted(one.seconds for one in best) and best[
    0
  ].seconds > 0
  nothing = candidates(CONFIG, HERE.devices(), on('v5e', memory=1.0))
  assert [sum(one.memory.values()) for one in nothing] == needs[:1], (
    'the smallest, where nothing fits'
  )


def test_a_second_candidate_is_compiled_where_the_first_does_not_fit(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """The compiler wants twice what was guessed, apart from the state: that is learnt from the first."""
  tried: list[float] = []

  def compiled(
    cfg: ExperimentConfig, devices: list[jax.Device], topology: Topology
  ) -> planned.Compiled:
    told = memory(cfg, shapes(cfg), topology)
    more = told['gradients'] + told['activations'] + told['other temporaries']
    tried.append(sum(told.values()) + more)
    return planned.Compiled(cfg, make_mesh(cfg.mesh), None, told | {'more': more}, 'text')

  monkeypatch.setattr(plan, 'compiled', compiled)
  counts = []
  for share in (0.6, 0.8, 1.0, 1.2, 1.5):
    limit = share * sum(memory(CONFIG, shapes(CONFIG), on('v5e')).values())
    found = plan.fit(CONFIG, HERE.devices(), on('v5e', memory=limit))
    counts.append(len(tried))
    assert planned.total(found) == tried[-1] <= limit and all(size > limit for size in tried[:-1])
    tried.clear()
  assert set(counts) <= {1, 2} and 2 in counts


@pytest.mark.slow
def test_a_plan_in_words(done: planned.Compiled) -> None:
  text = '\n'.join(planned.plan_lines(done, on('h200')._replace(sizes=(8,))))
  assert all(section in text for section in SECTIONS)
  assert 'it fits' in text and 'rules:' in text and 'over NVLink, 450 GB/s' in text
  small = on('v5e', memory=planned.total(done) / 2)
  text = '\n'.join(planned.plan_lines(done, small))
  assert 'it does not fit' in text and '--plan=fit' in text
  assert '--config.micro_batches=4: about ' in text
  assert (
    not planned.fits(done, small) and planned.fits(done, on('v5e')) and planned.fits(done, HERE)
  )


def test_remedies_are_what_the_model_and_the_batch_allow() -> None:
  assert list(planned.options(changed('none', data=4, fsdp=2))) == [
    '--config.model.remat=full',
    '--config.micro_batches=2',
    '--config.micro_batches=4',
    '--config.mesh.data=2 --config.mesh.fsdp=4',
  ]
  assert list(planned.options(changed('full', 4, data=1, fsdp=8))) == []


def test_what_a_compiler_refuses_is_told(
  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  def refuse(*args: object) -> None:
    raise jax.errors.JaxRuntimeError(
      'RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (231.27G) exceeds available HBM'
    )

  monkeypatch.setattr(plan, 'compile_step', refuse)
  assert (
    plan.print_plan(
      changed('none', data=8), 'once', on('v5e', compiler='cpu')._replace(text='cpu:8')
    )
    == 2
  )
  said = capsys.readouterr().out
  assert (
    '231 GiB' in said and 'it does not fit' in said and '--config.model.remat=full: about ' in said
  )


@pytest.mark.parametrize(
  ('text', 'count', 'message'),
  [
    ('v5p:8x8x8', 512, ''),
    ('v6e:16x16', 256, ''),
    ('tpu7x:2x2x1', 8, ''),
    ('h200:256', 256, ''),
    ('cpu:512', 512, ''),
    ('h300:8', 0, 'topology=h300:8 is not known: use one like v5p:8x8x8 .*h200:256.*cpu:512'),
    ('v5p:64', 0, 'v5p is by 3 sizes, not 1'),
    ('h200:12', 0, 'a multiple of 8'),
    ('v5p', 0, 'not known'),
    ('v5e:8x0', 0, 'not known'),
    ('cpu:2x2', 0, 'cpu is by 1 sizes'),
  ],
)
def test_names_of_slices(text: str, count: int, message: str) -> None:
  if message:
    with pytest.raises(ConfigError, match=message):
      parse_topology(text)
    return
  topology = parse_topology(text)
  assert topology.count == count
  assert topology.compiler != 'cpu' or 'CPU' in topology.note


def test_flags_go_together() -> None:
  assert read_plan_flags(['--config.steps=3']) == ('', None, ['--config.steps=3'])
  for argv, message in (
    (['--topology=cpu:8'], 'add --plan'),
    (['--plan'], 'needs --topology'),
    (['--plan=best', '--topology=cpu:8'], '--plan=best: use --plan'),
    (['--plan', '--topology='], 'needs --topology'),
  ):
    with pytest.raises(ConfigError, match=message):
      read_plan_flags(argv)
  with pytest.raises(ConfigError, match='has 8 CPU devices: start it with XLA_FLAGS'):
    parse_topology('cpu:9').devices()


def test_a_vocabulary_that_needs_no_data() -> None:
  def of(tokenizer: str, size: int = 0) -> int:
    model = dataclasses.replace(CONFIG.model, vocab_size=size)
    cfg = dataclasses.replace(CONFIG, model=model, data=DataConfig(tokenizer=tokenizer))
    return plan.with_known_vocabulary(cfg).model.vocab_size

  assert (of('bytes'), of('bpe:2048'), of('some/tokenizer.json', 99)) == (257, 2048, 99)
  with pytest.raises(ConfigError, match='a plan reads no data: give --config.model.vocab_size=N'):
    of('some/tokenizer.json')


def test_links_of_a_group() -> None:
  """v5p: 90 GB/s a link, both ways round a ring. H200: NVLink in a node; the network cards of a node add up."""
  torus = np.stack(np.unravel_index(np.arange(64), (4, 4, 4)), -1)
  v5p, h200 = CHIPS['v5p'], CHIPS['h200']
  assert links(torus[:4], (4, 4, 4), v5p) == (('ICI z',), 180e9)
  assert links(torus[:2], (4, 4, 4), v5p) == (('ICI z',), 90e9), 'half of an axis is no ring'
  assert links(torus[:16], (4, 4, 4), v5p) == (('ICI y', 'ICI z'), 360e9)
  assert links(torus[:4], (4, 4, 4), CHIPS['v6e']._replace(torus=3)) == (('ICI z',), 90e9), (
    'closed at 16 only'
  )
  numbers = np.arange(64)[:, None]
  assert links(numbers[:8], (64,), h200) == (('NVLink',), 450e9)
  assert links(numbers, (64,), h200) == (('network',), 400e9)
  assert links(numbers[::8], (64,), h200) == (('network',), 50e9)


def test_the_slowest_bound_rules_and_what_shares_a_link_adds_up() -> None:
  found = [
    Bound('compute', 3.0, ('compute',)),
    Bound('fsdp', 2.0, ('x', 'y')),
    Bound('expert', 1.5, ('x',)),
  ]
  assert least_time(found) == (3.5, 'x') and least_time(found[:2]) == (3.0, 'compute')
  assert mfu_ceiling(2.0, 8 * 989e12, 8, CHIPS['h200']) == 0.5
  node = on('h200')._replace(sizes=(8,))
  spoken = [
    Collective('all-gather', ('fsdp',), 1, 450e9),
    Collective('all-reduce', ('fsdp',), 2, 450e9),
  ]
  told = time_bounds(989e12, 4.8e12, spoken, make_mesh(MeshConfig(1, 8)), node)
  assert [(bound.seconds, bound.uses) for bound in told] == [
    (1, ('compute',)),
    (1, ('memory',)),
    (2, ('NVLink',)),
  ]


def test_remat_runs_the_blocks_again() -> None:
  parameters = count_parameters(shapes(CONFIG).model, CONFIG)
  tokens, useful = CONFIG.batch_size * CONFIG.seq_len, flops_per_token(parameters, CONFIG)
  assert step_flops(changed('none'), parameters) == (tokens * useful, tokens * useful)
  blocks = useful - 6 * parameters.embedding
  assert step_flops(changed('full'), parameters)[1] == pytest.approx(tokens * (useful + blocks / 3))
  assert (
    tokens * useful
    < step_flops(changed('dots'), parameters)[1]
    < step_flops(changed('full'), parameters)[1]
  )


def test_every_chip_has_its_figures() -> None:
  for name, chip in CHIPS.items():
    assert chip.flops > 1e14 and chip.memory > 1e10 and chip.hbm > 5e11 and chip.link >= 4.5e10, (
      name
    )
    assert bool(chip.torus) != bool(chip.node) and bool(chip.node) == bool(chip.network), name
    assert math.isfinite(chip.memory / chip.hbm)


def train(*argv: str, **env: str) -> subprocess.CompletedProcess:
  """`train.py` as a process of its own, which then says how many arrays it has."""
  code = (
    f'import sys, train; status = train.main({list(argv)!r}); import jax; '
    'print("arrays", len(jax.live_arrays())); sys.exit(status)'
  )
  clean = {key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'}
  return subprocess.run(
    [sys.executable, '-c', code],
    env=clean | {'PYTHONPATH': str(ROOT)} | env,
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
