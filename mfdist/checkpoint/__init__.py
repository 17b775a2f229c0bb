"""Checkpoints: a run's steps as zarr v3 stores that are committed whole or not at all.

`directory.py` is the way in; `state.py` is what is saved. The layout on disk is described, for readers without mfdist,
in docs/reference/checkpoint-layout.md.
"""
