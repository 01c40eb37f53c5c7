"""Forces torch's answer whether this CPU computes in fp16 to CHATGOT_TEST_FP16 (0 or 1), in every process of a test
run: the suite can be run as on another chip. tests/conftest.py puts this folder on the path.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from types import ModuleType

ANSWER = os.environ.get("CHATGOT_TEST_FP16") == "1"


def force(torch: ModuleType) -> None:
    """DeepSpeed's CPU accelerator and ChatGoT ask torch here."""
    torch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: ANSWER


class TorchFinder:
    """Finds torch as Python would and forces the answer once it is loaded, so that nothing else has to load it."""

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            force(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "CHATGOT_TEST_FP16" in os.environ:
    if "torch" in sys.modules:
        force(sys.modules["torch"])
    else:
        sys.meta_path.insert(0, TorchFinder())
