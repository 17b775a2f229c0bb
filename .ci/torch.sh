#!/bin/sh
# Puts torch into an environment that has none, and writes the constraints that keep it there.
#
#   PIP='python3 -m pip --python .venv/bin/python' sh .ci/torch.sh .venv/bin/python OUT
#
# An installed torch of 2.11 or later is kept. Where there is no NVIDIA GPU the CPU build is taken (0.2 GB instead of
# 2.7 GB of CUDA): a wheel that pip finds on this machine, or else the one from PyTorch's own index. TORCH names another
# version than the one in constraints.txt.
set -eu

python=$1
out=$2
version=${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}

installed() {
    "$python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version

try:
    release = version("torch").partition("+")[0]
except PackageNotFoundError:
    release = "0.0"
if tuple(int(part) for part in release.split(".")[:2]) >= (2, 11):
    print(release)
PYTHON
}

if [ -z "$(installed)" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then
        echo "Installing torch $version for the GPU that nvidia-smi shows (several GB)"
        $PIP install ${PIP_FLAGS:-} "torch==$version"
    elif [ "$(uname -s)" != Linux ]; then
        echo "Installing torch $version"
        $PIP install ${PIP_FLAGS:-} "torch==$version"
    else
        echo "Installing torch $version, the CPU build (nvidia-smi shows no GPU)"
        $PIP install ${PIP_FLAGS:-} --no-index --no-deps "torch==$version" 2>/dev/null ||
            $PIP install ${PIP_FLAGS:-} --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$version" || {
            echo "no CPU build of torch $version: pip finds no wheel here and PyTorch's CPU index gives none;"
            echo "have one of 2.11 or later in the system and use it: rm -r .venv; make VENV_FLAGS=--system-site-packages demo"
            exit 1
        }
    fi
fi

# A CUDA build names the triton it needs; the CPU build names none and gets the tested one.
kept=$(installed)
[ -n "$kept" ] || { echo "torch 2.11 or later is needed; pip installed none"; exit 1; }
names_triton=$("$python" -c 'from importlib.metadata import requires
print(sum(line.startswith("triton") for line in requires("torch") or []))')
if [ "$names_triton" != 0 ]; then drop='/^triton==/d'; else drop=; fi
sed -e "s/^torch==.*/torch==$kept/" -e "$drop" constraints.txt >"$out"
