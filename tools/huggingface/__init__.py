"""What makes an exported model one of transformers': its files, its code, its tokenizer, its card."""
