"""Looking at checkpoints, checking them, and rewriting them for another layout."""
