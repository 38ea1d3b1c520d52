"""Tokenised shards: `python -m tools.shards build | verify | stats | index` (the format: `pretrain.data.format`)."""
