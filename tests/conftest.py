"""For every test, and every process that a test starts: eight virtual CPU devices and a compilation
cache.

All by environment variables, set before anything imports jax: a test that needs no jax does not pay
for it.
"""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
# The default scheduler lets virtual devices meet two collectives in different orders, and wait for
# each other forever.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  '--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(Path(__file__).parents[1] / '.cache' / 'jax')
# Most of our programs are too small and too quick to compile for the defaults to keep them.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'


@pytest.fixture(scope='module', autouse=True)
def programs_go_with_their_file() -> Iterator[None]:
  """Each compiled program takes some memory mappings, and a process with 65530 of them dies at the
  next one."""
  yield
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()
    gc.collect()
