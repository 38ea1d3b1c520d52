"""Functions on tensors: the neural memory, attention, the loss; each beside its plain reference."""
