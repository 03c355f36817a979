"""Large numbers for a person: with a prefix of the SI, or a binary one."""


def human(number: float, base: int = 1000) -> str:
  """12_345_678 -> '12.3 M'; with base 1024, '11.8 Mi'."""
  for unit in ('', 'k', 'M', 'G', 'T', 'P'):
    if abs(number) < base or unit == 'P':
      break
    number /= base
  return f'{number:.3g} {unit}{"i" if base == 1024 and unit else ""}'
