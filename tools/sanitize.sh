#!/usr/bin/env bash
# Builds the tensor library with the address and undefined-behaviour sanitizers, beside the ordinary one, and runs the
# tests of the compiled kernels on it.
#   tools/sanitize.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
folder=$PWD/build/sanitize
mkdir -p "$folder"
# The in-place library stays as it is: this one is used through FASTDL_LIBRARY.
FASTDL_SANITIZE=address,undefined FASTDL_CUDA=off FASTDL_EMULATOR=1 "$python" setup.py --quiet build_ext --build-lib "$folder"

# Python itself is not instrumented, so the runtimes come first by LD_PRELOAD; libstdc++ with them, or the interceptor of
# C++ exceptions finds nothing to call. Leaks are off: Python keeps memory to its end by design.
cxx=${CXX:-c++}
preload=
for runtime in libasan.so libubsan.so libstdc++.so; do
    path=$("$cxx" -print-file-name="$runtime")
    if [ ! -e "$path" ]; then
        echo "sanitize: $cxx has no $runtime" >&2
        exit 1
    fi
    preload+="$(realpath "$path") "
done
# The levels that this build has, but for x86's scalar one, which is not instrumented (CMakeLists.txt).
levels=scalar
[[ $(uname -m) != x86_64 ]] || levels=avx2-plain,avx512,amx-twin
# tests/conftest.py sets the marker. Capturing in Python only: a report of the sanitizers reaches the terminal.
exec env LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    FASTDL_LIBRARY="$folder/fastdl/libfastdl_ops.so" FASTDL_EMULATED_LIBRARY="$folder/fastdl/libfastdl_emulated.so" \
    "$python" -m pytest -m native -q -n auto --capture=sys --levels $levels "$@"
