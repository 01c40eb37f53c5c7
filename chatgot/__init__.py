"""ChatGoT: a from-scratch GPT trainer on stock DeepSpeed."""

__version__ = "0.1.0"
