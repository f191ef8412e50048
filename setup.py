"""Packaging of sleep-ops.

The folder `kernels/` is installed as `sleep_ops.kernels`: Hugging Face publishes a package called `kernels` that
transformers imports, so no top-level module of that name may exist. For the same reason the folder has no
`__init__.py`, and `sleep_ops/kernels` is a link to it, for programs that run from the checkout.
"""

from setuptools import setup

setup(
    name="sleep-ops",
    version="0.1.0",
    description="Sleep for language models: looped consolidation of fast weights, with Triton gated-delta-rule kernels",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        "sleep_ops",
        "sleep_ops.kernels",
        "sleep_ops.bench",
        "sleep_ops.cli",
        "sleep_ops.ops",
        "sleep_ops.layers",
        "sleep_ops.model",
        "sleep_ops.adapters",
        "sleep_ops.adapters.hf",
        "sleep_ops.experiments",
        "sleep_ops.tasks",
        "sleep_ops.tasks.gsm_infinite",
        "sleep_ops.training",
        "sleep_ops.verify",
    ],
    package_dir={"sleep_ops.kernels": "kernels"},
    package_data={"sleep_ops": ["py.typed"], "sleep_ops.experiments": ["presets/*.toml", "figures/*.toml"]},
    install_requires=[
        "torch>=2.9",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "tomli; python_version < '3.11'",
        "safetensors",
        "huggingface_hub",
        "rich",
        "typer",
        "matplotlib",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "hf": ["transformers>=5.7", "accelerate"],
        "lora": ["transformers>=5.7", "accelerate", "peft"],
        "train": ["tensorboard"],
        "bench": ["pytest-benchmark", "pandas"],
        "test": [
            *("pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("transformers", "accelerate", "peft", "kernels"),
        ],
    },
    entry_points={"console_scripts": ["sleep-ops=sleep_ops.cli:main"]},
)
