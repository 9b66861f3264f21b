"""Presets of datasets and models, which `sanctl config new` composes; installed under this name."""
