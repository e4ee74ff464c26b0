"""Distributed trainer for Swin-V2 class multi-label image (and caption) classifiers on WebDataset shards."""

__version__ = "0.1.0"
