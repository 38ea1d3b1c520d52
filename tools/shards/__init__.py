"""Tokenised shards from text: `python -m tools.shards build | verify | stats` (the format: `pretrain.data.format`)."""
