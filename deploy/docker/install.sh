#!/bin/sh
# Puts the programs into a virtual environment, in two steps. The images and the tests run this same file: what goes
# into an image is what was tested. It is run in the root of the tree.
#
#   install.sh dependencies VENV EXTRA...   what these extras need; reads pyproject.toml and constraints.txt alone
#   install.sh programs VENV PLACE          the programs, from a wheel of the tree, into PLACE: to be copied over VENV,
#                                           whose Python they start
#
# TORCH_INDEX_URL: the package index that PyTorch (and torchvision) come from; empty: where everything comes from.
set -eu

python=${PYTHON:-python3}
step=$1
venv=$2
shift 2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

# The environment has no pip of its own: an image needs none.
pip_in() {
    target=$1
    shift
    "$python" -m pip --python "$target/bin/python" "$@"
}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case $step in
dependencies)
    "$python" -m venv --without-pip "$venv"
    "$python" - "$@" >"$scratch/requirements.txt" <<'END'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
needed = [*project["dependencies"], *(one for extra in sys.argv[1:] for one in project["optional-dependencies"][extra])]
print("\n".join(needed))
END
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        # By itself, and first: no other package can come from this index, and pip then keeps the build that is there.
        grep -oE '^torch(vision)?\b' "$scratch/requirements.txt" >"$scratch/torch.txt"
        pip_in "$venv" install --no-deps --index-url "$TORCH_INDEX_URL" -c constraints.txt -r "$scratch/torch.txt"
    fi
    pip_in "$venv" install -c constraints.txt -r "$scratch/requirements.txt"
    ;;
programs)
    # Not in an isolated build, which would fetch a build backend of any version.
    "$python" -m venv --without-pip "$scratch/build"
    pip_in "$scratch/build" install --quiet -c constraints.txt hatchling
    pip_in "$scratch/build" wheel --no-build-isolation --no-deps --wheel-dir "$scratch" .
    pip_in "$venv" install --no-deps --no-index --prefix "$1" "$scratch"/*.whl
    cp -a "$1/." "$venv"
    pip_in "$venv" check
    "$venv/bin/python" -c 'import torch; print("PyTorch", torch.__version__, "for CUDA", torch.version.cuda)'
    ;;
*)
    echo "install.sh: step '$step' came, expected dependencies or programs" >&2
    exit 2
    ;;
esac
