from setuptools import find_packages, setup

setup(
    name="chatgot",
    version="0.1.0",
    description="A from-scratch GPT trainer on stock DeepSpeed: kill it anywhere, resume it anywhere.",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["chatgot", "chatgot.*"]),
    package_data={"chatgot.presets": ["*.yaml"], "chatgot": ["presets/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "tqdm>=4.66",
        "wandb>=0.19",
        "ninja>=1.11",
    ],
    extras_require={
        "bpe": ["tokenizers>=0.20"],
        "dev": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "pyright", "import-linter"),
            *("hjson>=3.1", "transformers>=5", "tokenizers>=0.20"),
        ],
    },
    entry_points={"console_scripts": ["chatgot=chatgot.cli:main"]},
)
