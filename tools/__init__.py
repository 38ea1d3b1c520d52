"""Commands around training: tokenizer, shards, export, evaluate, generate."""
