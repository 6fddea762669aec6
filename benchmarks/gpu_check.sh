#!/usr/bin/env bash
# Is this machine's GPU fit for training here? Its names, then the tests for it, in some minutes:
#     benchmarks/gpu_check.sh [words for pytest, such as -x or -k tse]
# PYTHON=... picks the interpreter. It needs torch, torchvision, timm, pydantic, safetensors, rich, pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
fi
"$PYTHON" - <<'END'
import platform, sys
import timm, torch, torchvision
print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision "
      f"{torchvision.__version__}, timm {timm.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}")
if not torch.cuda.is_available():
    sys.exit("error: torch sees no CUDA device. Check the driver (nvidia-smi) and that torch was "
             "built for CUDA (its version ends in +cu...).")
one = torch.cuda.get_device_properties(0)
print(f"{one.name}, {one.total_memory / 2**30:.0f} GiB, compute capability {one.major}.{one.minor}, "
      f"bfloat16 {'in hardware' if torch.cuda.is_bf16_supported(including_emulation=False) else 'no'}")
END
exec "$PYTHON" -m pytest -m gpu tests/gpu -p no:cacheprovider --durations=5 "$@"
