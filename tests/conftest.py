"""For every test, and every process that a test starts: eight virtual CPU devices, programs that
are quickly compiled, and a compilation cache.

All by environment variables, set before anything imports jax: a test that needs no jax does not pay
for it.
"""

import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejax.runtime.command import collect_rarely

# Programs of tests run once or twice, so that compiling them is most of the time. An unknown flag
# would end the process, and only JAX 0.10 has the last one.
quick_flags = ['--xla_backend_optimization_level=0', '--xla_cpu_parallel_codegen_split_count=1']
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  quick_flags.append('--xla_cpu_use_fusion_emitters=false')

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    '--xla_force_host_platform_device_count=8',
    # The default scheduler lets virtual devices meet two collectives in different orders, and wait
    # for each other forever.
    '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED',
    *quick_flags,
  ]
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(Path(__file__).parents[1] / '.cache' / 'jax')
# What compiles in less is not worth the file: writing takes as long. The default, a second, would
# keep hardly any program of ours.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


# Where in Python an operation comes from, frame by frame, is a tenth of the time of lowering.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'

# A hangup that is ignored, as under nohup, would be so by every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

collect_rarely()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Fails where workers would each make the run that a group of tests shares.

  Raises:
    pytest.UsageError: a worker of pytest-xdist has lost the names of the groups.
  """
  if not config.getoption('loadgroup', False):
    return
  for item in items:
    if item.get_closest_marker('xdist_group') and '@' not in item.nodeid:
      raise pytest.UsageError(
        f'{item.nodeid} has lost its group: this pytest and this pytest-xdist do not go together; '
        'install what pyproject.toml names'
      )


MAPPINGS = Path('/proc/self/maps')
# So many are also some 4 GB.
MANY_MAPPINGS = 20_000


@pytest.fixture(scope='module', autouse=True)
def programs_go_when_they_are_many() -> Iterator[None]:
  """Each compiled program takes some memory mappings, and a process with 65530 of them dies at the
  next one. Only Linux has this limit, and this file."""
  yield
  if 'jax' not in sys.modules or not MAPPINGS.exists():
    return
  if MAPPINGS.read_bytes().count(b'\n') > MANY_MAPPINGS:
    sys.modules['jax'].clear_caches()
    gc.collect()
