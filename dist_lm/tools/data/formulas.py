"""All formulas and services."""

from dist_lm.tools.data.formulas_numbers import NUMBERS
from dist_lm.tools.data.formulas_services import SERVICES
from dist_lm.tools.data.formulas_words import WORDS

FORMULAS = (*NUMBERS, *WORDS, *SERVICES)
