"""Wrong programs, made by patching moejax at run time, and the line that must find each."""

from tests.support.mutants.adversary import ADVERSARY
from tests.support.mutants.adversary_three import ADVERSARY_THREE
from tests.support.mutants.adversary_two import ADVERSARY_TWO
from tests.support.mutants.draws import DRAWS
from tests.support.mutants.experts import EXPERTS
from tests.support.mutants.gradients import GRADIENTS
from tests.support.mutants.neighbours import NEIGHBOURS
from tests.support.mutants.patching import Mutant
from tests.support.mutants.published import PUBLISHED
from tests.support.mutants.routers import ROUTERS
from tests.support.mutants.sums import SUMS
from tests.support.mutants.updates import UPDATES

MUTANTS: dict[str, Mutant] = {
  **PUBLISHED,
  **GRADIENTS,
  **UPDATES,
  **DRAWS,
  **SUMS,
  **EXPERTS,
  **ROUTERS,
  **NEIGHBOURS,
  **ADVERSARY,
  **ADVERSARY_TWO,
  **ADVERSARY_THREE,
}
