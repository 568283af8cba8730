"""What the build made: levels stay in their namespaces, the library loads, CUDA code is in it where nvcc was found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fastdl import _library, backend

ROOT = Path(__file__).resolve().parent.parent
X86_VARIANTS = ("avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx", "amx_twin")


def level_objects() -> list[Path]:
    """Objects compiled for one level, from the build folder that the library under test came from."""
    library = backend.library_path().read_bytes()
    for folder in ROOT.glob("build/cmake-*"):
        built = folder / "out" / "libfastdl_ops.so"
        if built.is_file() and built.read_bytes() == library:
            found = folder.glob("CMakeFiles/*.dir/csrc/cpu/*.o")
            return [path for path in found if variant(path) is not None]
    return []


def variant(path: Path) -> str | None:
    """Level of an object, from its CMake target <room>_<level>; None: compiled once."""
    target = path.parts[-4].removesuffix(".dir")
    return max((v for v in ("scalar", *X86_VARIANTS) if target.endswith(f"_{v}")), key=len, default=None)


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type, demangled name) of every symbol that the object defines."""
    shown = subprocess.run(["nm", "--defined-only", "-C", str(path)], capture_output=True, text=True, check=True)
    rows = (line.split(maxsplit=2) for line in shown.stdout.splitlines())
    return [(row[1], row[2]) for row in rows if len(row) == 3]


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    if not backend.native_loaded():
        pytest.skip(f"compiled library: {backend.native_error()}")
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    found = level_objects()
    if not found:
        pytest.skip("the library under test was not built in this source tree")
    return found


def test_level_objects_define_no_weak_symbols(objects):
    """The linker keeps one of several weak definitions for everybody: an AVX-512 one would crash smaller CPUs."""
    weak = {
        f"{path.name} {variant(path)}: {name}" for path in objects for kind, name in symbols(path) if kind in "WwVvu"
    }
    assert not weak


def test_level_objects_define_only_their_own_namespace(objects):
    for path in objects:
        expected = f"fastdl::{variant(path)}::"
        strangers = [name for kind, name in symbols(path) if kind in "TDBRC" and expected not in name]
        assert not strangers, f"{path}: {strangers}"


def test_level_objects_are_there_for_every_level(objects):
    levels = set((backend.build_info().get("levels") or "scalar").split(","))
    assert {variant(path) for path in objects} >= levels


def test_library_exports_only_the_c_functions(native):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    shown = subprocess.run(["nm", "-D", "--defined-only", str(backend.library_path())], capture_output=True, text=True)
    strong = {line.split()[2] for line in shown.stdout.splitlines() if line.split()[1] in "TR"}
    ours = {name for name in strong if not name.startswith(("_init", "_fini", "__asan", "__odr_asan"))}
    assert ours == {"fastdl_cpu_features", "fastdl_cpu_level", "fastdl_schema_marker", "fastdl_set_level_cap"}


def test_library_loads(native):
    assert backend.native_error() is None
    assert backend.cpu_level() in ("scalar", "avx2", "avx512", "amx", "amx-twin")


def test_one_openmp_runtime_in_the_process(native):
    """Two would mean two thread pools that fight for the cores. In a process of its own: other packages that the tests
    import (sentencepiece) bring an OpenMP runtime along."""
    script = (
        "import torch, fastdl; fastdl.ops.quantize(torch.ones(4, 32), 'q4_1'); print(open('/proc/self/maps').read())"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    mapped = {line.split()[-1] for line in shown.splitlines() if "/" in line}
    assert len({path for path in mapped if "libgomp" in path or "libomp" in path or "libiomp" in path}) == 1


def test_build_hash_is_python_hash():
    shown = subprocess.run(
        [sys.executable, ROOT / "tools" / "schema_hash.py"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == _library.schema_hash()


def test_build_info(native):
    info = backend.build_info()
    if not info:
        pytest.skip("fastdl._native is not built for this Python")
    assert set(info) == {"compiler", "flags", "levels", "cuda", "cuda_archs", "torch", "schema_hash"}
    assert "-ffast-math" not in info["flags"]
    assert "-flto" not in info["flags"]
    from fastdl import _native

    _native.attach(str(backend.library_path()))
    assert _native.cpu_level() == backend.cpu_level()
    assert _native.cpu_features() == backend.cpu_features()
    with pytest.raises(ValueError, match="unknown CPU level 'sse9'"):
        _native.set_level_cap("sse9")


def has_cuda_kernel() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastdl::cuda_smoke", "CUDA")


def test_cuda_code_is_built_where_nvcc_is(native):
    info = backend.build_info()
    if not info.get("cuda"):
        pytest.skip("built without CUDA")
    assert has_cuda_kernel()
    data = backend.library_path().read_bytes()
    for arch in info["cuda_archs"].replace("+PTX", "").split():
        assert f"sm_{arch}".encode() in data


@pytest.mark.lane("gpu")
@pytest.mark.lane("gpu")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_smoke_runs(native):
    if not has_cuda_kernel():
        pytest.skip("built without CUDA")
    x = torch.randn(1000, device="cuda")
    torch.testing.assert_close(torch.ops.fastdl.cuda_smoke(x, 2.0, 1.0), x * 2 + 1)
    assert torch.ops.fastdl.cuda_smoke(x[:0], 2.0, 1.0).shape == (0,)


def build(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py of a copy of what it reads, so that the tree under test is left alone."""
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("copy")
    for name in ("fastdl", "kernels", "csrc", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    keep = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**keep, **environment},
        capture_output=True,
        text=True,
    )


def test_no_torch_stops_with_what_to_type(tmp_path):
    """Also under pip's build isolation, where the check must come before pip resolves (and downloads) torch."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    for package in ("setuptools", "_distutils_hack", "pkg_resources"):
        for site in map(Path, sys.path):
            if (site / package).is_dir():
                os.symlink(site / package, next(bare.glob("lib/python3*/site-packages")) / package)
                break
    copy = tmp_path / "copy"
    copy.mkdir()
    build(copy, "--version")
    shown = subprocess.run(
        [bare / "bin" / "python", "setup.py", "dist_info"],
        cwd=copy,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "PYTHONPATH")},
    )
    assert shown.returncode == 1
    assert "-m pip install torch==2.13.0" in shown.stderr
    assert "-m pip install --no-build-isolation ." in shown.stderr


@pytest.mark.skipif("FASTDL_TEST_WHEEL" not in os.environ, reason="FASTDL_TEST_WHEEL names no wheel (`make wheel`)")
def test_wheel_holds_the_package_alone():
    names = zipfile.ZipFile(os.environ["FASTDL_TEST_WHEEL"]).namelist()
    assert {name.split("/")[0] for name in names} == {"fastdl", "fastdl_kernels-0.1.0.dist-info"}
    assert "fastdl/libfastdl_ops.so" in names
    assert "fastdl/kernels/__init__.py" in names
