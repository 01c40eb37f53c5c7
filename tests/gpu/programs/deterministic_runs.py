"""tests.distributed.programs.runs with PyTorch's deterministic algorithms."""

from __future__ import annotations

import torch

from tests.distributed.programs.runs import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main()
