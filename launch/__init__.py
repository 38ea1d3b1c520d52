"""From a recipe to processes on this machine."""
