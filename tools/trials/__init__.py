"""Trials: many small runs that show what each part of a model is worth, and their report."""
