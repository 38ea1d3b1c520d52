"""What a run would need of a cluster, and how long its steps would take: an estimate before anything is started."""
