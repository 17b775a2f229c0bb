"""Models that people have, converted: chosen linear layers become memory layers that begin as close to them as can be.

`replacement.py` is the way in; `choice.py` says which layers, `centroids.py` what their rows are,
`converted_linear.py` what stands in their place.
"""

from mfdist.conversion.converted_linear import ConvertedLinear
from mfdist.conversion.replacement import ReplacedLayer, Replacement, replace_linear

__all__ = ["ConvertedLinear", "ReplacedLayer", "Replacement", "replace_linear"]
