"""Benchmarks: each is a command that prints a table and writes a JSON record with hardware, versions, commit, command."""
