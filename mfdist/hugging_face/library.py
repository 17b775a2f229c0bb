"""The only module that imports `transformers`: what of it is used here, or one line on how to install it."""

import sys
from importlib.util import find_spec
from pathlib import Path

from mfdist.errors import ConfigError

# In a checkout the folder kernels/ lies on the path under the bare name of another project's package, which
# transformers would take it for and import. None in sys.modules is Python's way to say that there is no such module.
_found = None if "kernels" in sys.modules else find_spec("kernels")
if (
    _found is not None
    and _found.origin
    and Path(_found.origin).samefile(Path(__file__).parents[1] / "kernels/__init__.py")
):
    sys.modules["kernels"] = None  # type: ignore[assignment]

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        Cache,
        DynamicCache,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ConfigError(f"transformers must be installed: pip install mfdist[transformers] ({error})") from error

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "GenerationMixin",
    "PreTrainedConfig",
    "PreTrainedModel",
    "create_causal_mask",
]
