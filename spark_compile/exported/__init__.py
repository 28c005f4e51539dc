"""Exported graphs: a decoder as two programs that run without its Python code."""
