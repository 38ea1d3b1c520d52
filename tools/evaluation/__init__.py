"""Benchmarks of exported models: downstream tasks through lm-eval, and long contexts; run by `tools.evaluate`."""
