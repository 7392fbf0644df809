"""Scorers that need an environment of their own: each file is a plug for `mmalign serve` there, with its recipe in its docstring."""
