"""Dispatchers on a mesh: against the oracle, whichever exchange brings tokens to their experts."""

import jax
import numpy as np
import pytest

from moejax.moe.dispatch.dispatchers import DispatchConfig
from moejax.moe.experts.grouped_ffn import BEST_BY_PLATFORM
from moejax.sharding.mesh import MeshConfig, make_mesh
from tests.support.dispatch_oracle import (
  DROPLESS,
  DY,
  GPT_OSS,
  PLAIN,
  ROOMY,
  TIGHT,
  Ffn,
  check_dispatch,
  experts,
  jobs,
  name_of,
  run,
  run_on_one_device,
)
from tests.support.emulated_exchange import emulate
from tests.support.kernel_interpreter import interpret_kernels
from tests.support.quick import QUICK

EXCHANGED = [
  DROPLESS[0],
  *(DispatchConfig('sparse_matmul', exchange=name) for name in ('gather', 'ragged')),
]


@pytest.mark.parametrize(
  ('cfg', 'ffn'),
  [
    *((cfg, PLAIN) for cfg in (*EXCHANGED, ROOMY[0])),
    *((cfg, GPT_OSS) for cfg in (*EXCHANGED, TIGHT[1])),
  ],
  ids=name_of,
)
def test_a_mesh_is_the_oracles_too(
  cfg: DispatchConfig, ffn: Ffn, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Experts over two devices, their hidden layer over two, rows over two times two.

  Drops are each device's own.
  """
  emulate(monkeypatch)
  check_dispatch(cfg, 4, 2, ffn, MeshConfig(data=2, expert=2, tensor=2))


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [MeshConfig(2, 2), MeshConfig(1, 2, 1, 4), MeshConfig(1, 1, 4, 2), MeshConfig(1, 2, 2, 2)],
  ids=str,
)
@pytest.mark.parametrize('cfg', [*EXCHANGED, *ROOMY, *TIGHT], ids=name_of)
def test_any_mesh_is_the_oracles(
  cfg: DispatchConfig, sizes: MeshConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
  emulate(monkeypatch)
  check_dispatch(cfg, 4, 2, GPT_OSS, sizes)


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['ragged_dot', 'triton'])
@pytest.mark.parametrize('ffn', [PLAIN, GPT_OSS], ids=name_of)
def test_a_mesh_changes_nothing_where_there_is_a_grouped_matmul(
  ffn: Ffn, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As on a TPU, and as on a GPU."""
  cfg = DROPLESS[1]
  want = run_on_one_device(cfg, 4, 2, 'padded', ffn)
  args = jobs(4, 2)['padded'], experts(4, ffn.bias), DY
  monkeypatch.setitem(BEST_BY_PLATFORM, 'cpu', implementation)
  kernels = interpret_kernels(monkeypatch)
  # Not `run`, whose cache may hold a trace of another implementation.
  anew = jax.jit(lambda *args: run.__wrapped__(cfg, *args, ffn.activation), compiler_options=QUICK)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
    has_ragged_dot = 'ragged_dot' in str(anew.trace(*args).jaxpr)
    assert has_ragged_dot == (implementation == 'ragged_dot')
    assert bool(kernels) == (implementation == 'triton')
    got = jax.tree.map(np.asarray, anew(*args))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
