"""Everything that knows ranks: processes, ZeRO, and the engine that the training loop drives."""
