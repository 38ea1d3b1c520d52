"""Everything that knows ranks: process groups, DeepSpeed engine, layouts."""
