"""Benchmarks: commands that print a table and write a JSON record with hardware, versions, commit and command."""
