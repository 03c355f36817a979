"""What do the kernels and a whole training step reach on one NVIDIA GPU?

  python -m benchmarks.gpu                 under eight minutes on an H100 or H200
  python -m benchmarks.gpu --only=layers   one part: ceilings, numerics, layers, step
  python -m benchmarks.gpu --tune          tile sizes of each kernel, the fastest first
  python -m benchmarks.gpu --quick         on CPU, tiny and interpreted: shows that it runs

The ceilings come first, measured on the same card: a copy, and a dense product of random bfloat16
numbers. Then each kernel against float32 products of one expert at a time; then the experts of
published layers, forward and backward, on even and on uneven loads, as TFLOP/s of what is active
and as a share of the ceiling, beside torch's grouped matmul; then a step of OLMoE. Each line is
printed as soon as it is measured, and a part that fails says so and lets the others run.

Letters: T tokens, D model, F FFN hidden, E experts, K experts per token, N = T * K copies.
"""

import argparse
import sys
import traceback
from collections.abc import Callable

from benchmarks.gpu_parts import ceilings, layers, numerics, step, tune

PARTS: dict[str, Callable[[bool], None]] = {
  'ceilings': ceilings.main,
  'numerics': numerics.main,
  'layers': layers.main,
  'step': step.main,
}


def main() -> int:
  """Runs the parts; returns 1 if one of them failed."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', choices=list(PARTS), help='this part alone')
  parser.add_argument('--tune', action='store_true', help='time tile sizes, and nothing else')
  parser.add_argument(
    '--quick',
    action='store_true',
    help='the smallest size, once: shows that it runs, and measures nothing',
  )
  args = parser.parse_args()
  parts = {'tune': tune.main} if args.tune else PARTS
  failed = False
  for name, part in parts.items():
    if args.only not in (None, name):
      continue
    try:
      part(args.quick)
    except Exception:  # what the other parts measure is still worth having
      failed = True
      print(f'{name} FAILED', flush=True)
      traceback.print_exc()
  return int(failed)


if __name__ == '__main__':
  sys.exit(main())
