"""ChatGoT: a from-scratch GPT trainer on stock DeepSpeed.

From Python: `chatgot.train(...)` trains and `chatgot.load("runs/book")` opens a run folder. Importing this loads no
torch and changes no environment variable.
"""

from chatgot.api import Run, load, train
from chatgot.errors import ChatGoTError
from chatgot.version import __version__

__all__ = ["ChatGoTError", "Run", "__version__", "load", "train"]
