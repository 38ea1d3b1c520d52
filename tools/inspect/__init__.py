"""Looking into models: what their memories did with a text, and what a memory holds."""
