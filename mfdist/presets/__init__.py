"""The configurations that ship with mfdist, each a TOML file that `load_config` finds by its name."""
