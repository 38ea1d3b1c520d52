"""From a recipe to processes: local and Slurm."""
