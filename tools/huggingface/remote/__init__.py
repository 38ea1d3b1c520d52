"""Source of the code that exported models carry, where it is not that of kernels/ and model/ itself.

`tools.huggingface.package` copies these files; nothing here imports them, and transformers is needed by none but them.
"""
