"""The package definition; tool settings are in pyproject.toml, versions known to work together in constraints.txt.

What the extras are for stands in docs/install.md, in one table.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (pip runs this file before it looks at python_requires)
    sys.exit("DSMR needs Python 3.11 or newer, but this is Python {}.{}".format(*sys.version_info[:2]))

from pathlib import Path

from setuptools import find_packages, setup

TRITON = ['triton>=3.6; sys_platform == "linux"']
BENCH = ["pytest>=8", "pytest-benchmark>=5"]
# Horizons in models of Hugging Face Transformers: 5.23 is the first to ask layers for their own windows.
HF = ["transformers>=5.23"]
PEERS = ["x-transformers>=2.3", *HF]
PLAY = ["mido>=1.3", "python-rtmidi>=1.5"]
# Sound. Its own dependency PyAudio, which rendering never imports, has to be compiled where it has no wheel: so it is
# not in `dev`, and the Makefile installs it alone.
AUDIO = ["tinysoundfont>=0.3.6"]
# Playing an exported model, and making one. `GroupQueryAttention` over int8 memories is of ONNX Runtime 1.32.
ONNX = ["onnxruntime>=1.32", "onnx>=1.17"]
# The pages as a site (`make docs`), and their API from the docstrings.
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]

setup(
    name="dsmr",
    version="0.1.0",
    description="Transformers that read whole pieces of music in bounded memory, with a memory horizon for every layer",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dsmr", "dsmr.*", "dsmr_kernels", "dsmr_kernels.*"]),
    package_data={"dsmr": ["py.typed"], "dsmr_kernels": ["py.typed"]},
    install_requires=["torch>=2.11", "numpy>=1.26", "safetensors>=0.4", "rich>=13", "typer>=0.12"],
    extras_require={
        # MidiTok reads and writes MIDI, matplotlib draws; training on a prepared corpus needs neither.
        "music": ["miditok>=3.1", "matplotlib>=3.8"],
        "triton": TRITON,
        # Real-time playing through MIDI ports.
        "play": PLAY,
        # `dsmr render` and --wav: a SoundFont's piano as a WAV file, without a sound card or a system library.
        "audio": AUDIO,
        # Models that play without PyTorch: `dsmr export`, and what plays them (docs/onnx.md).
        "onnx": ONNX,
        # Memory horizons in models of Hugging Face Transformers (docs/huggingface.md).
        "hf": HF,
        # The peers that ours is measured against; where they are missing, their rows are skipped.
        "bench": [*BENCH, *PEERS, *ONNX, "matplotlib>=3.8"],
        "docs": DOCS,
        "dev": [
            *BENCH,
            *ONNX,
            *HF,
            "hypothesis>=6",
            "mido>=1.3",
            "pytest-xdist>=3",
            "ruff>=0.12",
            "mypy>=1.15",
            "import-linter>=2.5",  # who may import whom, kept by `make lint`; grimp, which it uses, draws it
            "miditok>=3.1",
            "matplotlib>=3.8",
            "pyyaml>=6",  # the tests read mkdocs.yml and CITATION.cff
            *TRITON,
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Multimedia :: Sound/Audio :: MIDI",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    entry_points={"console_scripts": ["dsmr = dsmr.cli:main"]},
    zip_safe=False,
)
