"""MUBiC in eager PyTorch: the reference that every other engine is measured against.

A model is four modules, one a graph; each takes and returns tensors in the order of its signature (graphs.py)."""
