import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("chatgot/version.py").read_text(encoding="utf-8"))
assert VERSION is not None

setup(
    name="chatgot",
    version=VERSION[1],
    description="A from-scratch GPT trainer on stock DeepSpeed: kill it anywhere, resume it anywhere.",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["chatgot", "chatgot.*"]), "chatgot.presets", "chatgot.ds_configs"],
    package_dir={"chatgot.ds_configs": "ds_configs"},
    package_data={
        "chatgot.presets": ["*.yaml"],
        "chatgot.inference": ["page.html"],
        "chatgot.observe": ["report.html"],
        "chatgot.ds_configs": ["*.json", "README.md"],
    },
    install_requires=[
        "ahocorasick-rs>=1.0",
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "hjson>=3.1,<4",
        "numpy>=1.26",
        "plotext>=5.3,<6",
        "plotly>=6",
        "psutil>=5.9",
        "pydantic>=2.7,<3",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "wandb>=0.19",
        "ninja>=1.11",
    ],
    extras_require={
        "bpe": ["tokenizers>=0.20"],
        "export": ["transformers>=5", "gguf>=0.17"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "import-linter"),
            *("transformers>=5", "tokenizers>=0.20", "gguf>=0.17"),
            *("starlette>=0.40", "uvicorn>=0.30", "openai>=1.50", "selenium>=4.20"),
        ],
    },
    entry_points={"console_scripts": ["chatgot=chatgot.cli:main"]},
)
