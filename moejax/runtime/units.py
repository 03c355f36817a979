"""Large numbers as a person reads them: with a prefix of the SI, or a binary one."""

PREFIXES = ('', 'k', 'M', 'G', 'T', 'P')


def human(number: float, base: int = 1000) -> str:
  """Returns a number in three digits with a prefix: 12_345_678 -> '12.3 M'.

  A number below the base keeps the space for the prefix, as in '7 '; a unit is put behind it. Above
  the last prefix, P, the digits grow. Numbers below 1 have no prefix of their own.

  Args:
    number: of any sign.
    base: what the step from one prefix to the next is; 1024 gives binary ones, '11.8 Mi'.
  """
  for prefix in PREFIXES:
    if abs(number) < base or prefix == PREFIXES[-1]:
      break
    number /= base
  binary_mark = 'i' if base == 1024 and prefix else ''
  return f'{number:.3g} {prefix}{binary_mark}'
