from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

version: dict[str, str] = {}
exec((ROOT / "dlm_fast" / "version.py").read_text(encoding="utf-8"), version)

# The folder kernels/ holds the package dlm_kernels and is no package itself: a module named `kernels` would hide, or
# once installed overwrite, Hugging Face's package of that name, which transformers imports
# (tests/package/test_shadow.py).
PACKAGES = find_packages(include=["dlm_fast", "dlm_fast.*"]) + find_packages(
    "kernels", include=["dlm_kernels", "dlm_kernels.*"]
)

README = ROOT / "README.md"

setup(
    name="dlm-fast",
    version=version["__version__"],
    description="Fast, exact decoding of diffusion language models on your own GPU",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    author="The dlm-fast authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=PACKAGES,
    package_dir={"dlm_kernels": "kernels/dlm_kernels"},
    package_data={
        "dlm_fast": ["py.typed", "tiny/checkpoints/*/*"],  # the embedded tiny models
        "dlm_kernels": ["py.typed"],
    },
    entry_points={"console_scripts": ["dlm-fast = dlm_fast.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        'triton>=3.6,<3.10; platform_system == "Linux"',
        "transformers>=5.17",
        "numpy",
        "accelerate",  # weights go to their device as they are read
        "huggingface-hub",
        "safetensors",
        "tokenizers",
        "jinja2",  # chat templates
        "rich",
        "tqdm",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "peft"],
        "train": ["peft", "matplotlib"],
        "bench": ["matplotlib", "pytest-benchmark"],
        "lint": ["ruff"],
        # Some 600 MB that decoding never needs: no other extra has it, and no constraint pins it.
        "ray": ["ray[data]"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
