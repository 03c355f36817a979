"""What accelerators can do, one row a chip: memory, arithmetic, and links. Knows nothing of JAX.

Sources. TPU: cloud.google.com/tpu/docs (system architecture, one page a generation) for arithmetic,
bandwidth of memory and of the interconnect; memory is what XLA says a program has of it. GPU: the
makers' data sheets of A100, H100, H200 and B200 (dense bfloat16, without sparsity); networks as
sold beside them: 200 Gb/s a GPU (A100), 400 Gb/s (the others).
"""

from typing import NamedTuple

GIB = 2**30

# Dense bfloat16 FLOP/s of a JAX device by what its device_kind holds (makers' data sheets). The
# first row that fits counts: 'TPU v5e' and 'H100 PCIe' stand before 'TPU v5' and 'H100'.
PEAK_FLOPS = {
  'TPU v2': 22.5e12,
  'TPU v3': 61.5e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'TPU7x': 1153.5e12,
  'A100': 312e12,
  'H100 PCIe': 756e12,
  'H100': 989e12,
  'H200': 989e12,
  'GH200': 989e12,
  'B200': 2250e12,
  'L40S': 362e12,
  'NVIDIA L4': 121e12,
}


class Chip(NamedTuple):
  """One JAX device: a TPU chip (of the 7x half a chip) or a GPU.

  Bandwidths are in bytes/s, those of links in one direction.
  """

  kind: str  # what device_kind holds
  memory: float  # bytes that a program can have
  hbm: float  # bandwidth of the memory
  link: float  # bandwidth; TPU: of one link of the torus, GPU: of all its NVLinks together
  torus: int = 0  # axes of the torus; 0: a GPU
  wraps: int = 0  # an axis of so many chips, or more, is closed to a ring: both directions carry
  node: int = 0  # GPUs that NVLink joins
  network: float = 0.0  # bandwidth of a GPU to other nodes
  per_chip: int = 1  # JAX devices in a chip

  @property
  def flops(self) -> float:
    """Dense bfloat16 FLOP/s of this device."""
    return peak_flops(self.kind)


def peak_flops(device_kind: str) -> float:
  """Returns dense bfloat16 FLOP/s of a JAX device; 0 where that is not known, as on CPU."""
  for name, flops in PEAK_FLOPS.items():
    if name in device_kind:
      return flops
  return 0.0


# Name in --topology -> chip.
CHIPS: dict[str, Chip] = {
  'v4': Chip('TPU v4', 30.75 * GIB, 1.23e12, 45e9, torus=3, wraps=4),
  'v5e': Chip('TPU v5 lite', 15.75 * GIB, 0.82e12, 45e9, torus=2, wraps=16),
  'v5p': Chip('TPU v5', 95.73 * GIB, 2.77e12, 90e9, torus=3, wraps=4),
  'v6e': Chip('TPU v6 lite', 31.24 * GIB, 1.64e12, 90e9, torus=2, wraps=16),
  'tpu7x': Chip('TPU7x', 94.74 * GIB, 3.69e12, 45e9, torus=3, wraps=4, per_chip=2),
  'a100': Chip('A100', 80e9, 2.04e12, 300e9, node=8, network=25e9),
  'h100': Chip('H100', 80e9, 3.35e12, 450e9, node=8, network=50e9),
  'h200': Chip('H200', 141e9, 4.8e12, 450e9, node=8, network=50e9),
  'b200': Chip('B200', 180e9, 8.0e12, 900e9, node=8, network=50e9),
}
