"""The whole way on one machine without a GPU, from source text to a generated sample."""
