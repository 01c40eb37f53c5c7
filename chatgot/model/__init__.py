"""The GPT in plain PyTorch, and sampling from it."""
