"""The door to Hugging Face: MemoryFormer as a model of `transformers`, and the folders that its tools read and write.

`MemoryFormerForCausalLM` and `MemoryFormerConfig` need `pip install mfdist[transformers]`; importing them makes
`AutoModelForCausalLM` know them. Folders are read and written without that library: `load_folder`, `export_step`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mfdist.hugging_face.configuration import MemoryFormerConfig
    from mfdist.hugging_face.export import export_step
    from mfdist.hugging_face.folder import load_folder
    from mfdist.hugging_face.modeling import MemoryFormerForCausalLM

__all__ = ["MemoryFormerConfig", "MemoryFormerForCausalLM", "export_step", "load_folder"]

_HOME = {
    "MemoryFormerConfig": "mfdist.hugging_face.modeling",  # whoever names either class registers both
    "MemoryFormerForCausalLM": "mfdist.hugging_face.modeling",
    "export_step": "mfdist.hugging_face.export",
    "load_folder": "mfdist.hugging_face.folder",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'mfdist.hugging_face' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
