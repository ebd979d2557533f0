"""Block-sparse linear layers: whole blocks of the weight are there or not, and only those that are there are computed.

>>> from partita.search.blocks import BlockLinear, fastest_form, with_blocks
"""

from partita.search.blocks.forms import fastest_form, forms_of, with_blocks
from partita.search.blocks.layer import BlockLinear, block_mask
from partita.search.blocks.measure import Forms, measure_forms

__all__ = ["BlockLinear", "Forms", "block_mask", "fastest_form", "forms_of", "measure_forms", "with_blocks"]
