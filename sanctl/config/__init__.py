"""Configuration: YAML files, presets and overrides, read into one checked set of values."""
