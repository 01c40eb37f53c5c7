"""Models in transformers' layout: names, keys, tensors, tokenizers. `chatgot export` writes, --init_from reads it."""
