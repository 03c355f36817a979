"""The exact value of the decimal that a float is written as, for counts that are made of it.

A product of floats rounds: 1000 / 10 * 1.1 is a little above 110, and rounded up it is 111.
"""

from fractions import Fraction


def decimal_of(number: float) -> Fraction:
  """Returns the value of the shortest decimal that reads as this number: 11/10 of 1.1.

  That is what a person wrote, up to 15 digits. Products with whole numbers are then exact, and so
  is what is rounded of them: `round`, `math.floor` and `math.ceil` take a Fraction.

  Raises:
    ValueError: the number is not finite.
  """
  # float(), since the repr of a NumPy scalar names its type.
  return Fraction(repr(float(number)))
