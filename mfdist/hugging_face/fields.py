"""From the fields of a config.json to a model's shape, with one line that says what is wrong."""

from collections.abc import Mapping
from typing import Any

from mfdist.config import ModelConfig
from mfdist.config_errors import first_problem
from mfdist.errors import ConfigError


def model_config(kind: str, sizes: Mapping[str, Any]) -> ModelConfig:
    """Return a validated shape.

    Raises:
        ConfigError: a size is missing or wrong.
    """
    try:
        return ModelConfig.model_validate({"kind": kind, **sizes})
    except ValueError as error:
        raise ConfigError(f"config.json must describe a model that mfdist can build; {first_problem(error)}") from None
