"""Builds the native part with CMake and Ninja and packages it; CMakeLists.txt says what is built and how.

    pip install --no-build-isolation .        into an environment that has torch
    python setup.py build_ext --inplace       (or `make build`) for work in the source tree

Environment: FASTDL_CUDA=auto|on|off, FASTDL_CUDA_ARCHS="80 90a +PTX"|all, FASTDL_WERROR=1,
FASTDL_SANITIZE=address,undefined, FASTDL_JOBS=<parallel compilers>, CXX=<compiler>. Builds in the source tree also make
libfastdl_emulated.so, which only tests use; FASTDL_EMULATOR=1 makes it elsewhere too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_MIN = (2, 10)
NO_TORCH = """
fastdl-kernels is compiled against the PyTorch that is already in your environment, and found none there.
Type this (any torch from 2.10 on will do; a plain `pip install torch` brings several GB of CUDA packages):

    {python} -m pip install torch==2.13.0
    {python} -m pip install "setuptools>=77" wheel "cmake>=3.22" ninja pybind11 numpy
    {python} -m pip install --no-build-isolation .
"""


def find_torch() -> Path | None:
    """Folder of the torch package: of this interpreter, or of the environment around pip's isolated build.

    pip's isolation hides the environment through PYTHONPATH and a sitecustomize module; ``-I`` ignores both, so the
    same interpreter sees the outer environment again. Only the location is asked for: importing torch takes seconds.
    """
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in ([], ["-I"]):
        found = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd="/")
        folder = found.stdout.strip()
        if found.returncode == 0 and folder and Path(folder, "version.py").exists():
            return Path(folder)
    return None


def require_torch() -> Path:
    torch = find_torch()
    if torch is None:
        raise SystemExit(NO_TORCH.format(python=sys.executable))
    version: dict[str, str] = {}
    exec((torch / "version.py").read_text(encoding="utf-8"), version)
    text = str(version["__version__"])
    if tuple(int(part) for part in text.split("+")[0].split(".")[:2]) < TORCH_MIN:
        raise SystemExit(f"torch {text} in {torch} is too old: fastdl needs torch 2.10 or later")
    return torch


def find_tool(name: str) -> str:
    """cmake or ninja: beside this interpreter, from its Python package, or on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"{name} was not found. Type: {sys.executable} -m pip install {name}")
    return found


def pybind11_dir() -> str | None:
    try:
        import pybind11
    except ImportError:
        print("pybind11 is not installed: fastdl._native (build information) is left out", file=sys.stderr)
        return None
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions and copies what came out into the package."""

    def run(self) -> None:
        inplace = self.inplace or self.editable_mode
        package = ROOT / "fastdl" if inplace else Path(self.build_lib).resolve() / "fastdl"
        settings = {
            "FASTDL_TORCH_DIR": str(require_torch()),
            "FASTDL_CUDA": os.environ.get("FASTDL_CUDA") or "auto",
            "FASTDL_CUDA_ARCHS": os.environ.get("FASTDL_CUDA_ARCHS", ""),
            "FASTDL_SANITIZE": os.environ.get("FASTDL_SANITIZE", ""),
            "FASTDL_EMULATOR": "ON" if inplace or os.environ.get("FASTDL_EMULATOR") == "1" else "OFF",
            "FASTDL_WERROR": "ON" if os.environ.get("FASTDL_WERROR", "0") not in ("", "0") else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        }
        if pybind := pybind11_dir():
            settings["pybind11_DIR"] = pybind
        cmake = find_tool("cmake")
        # One build folder per set of tools and settings: CMake's cache must not mix two of them, and pip's isolated
        # builds bring a cmake whose path is gone afterwards.
        # (Other architectures only recompile the CUDA sources.)
        parts = [
            cmake,
            os.environ.get("CXX"),
            *(value for name, value in settings.items() if name != "FASTDL_CUDA_ARCHS"),
        ]
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one tree at once would trip over each other
            defines = [f"-D{name}={value}" for name, value in settings.items()]
            self._call([cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *defines])
            jobs = os.environ.get("FASTDL_JOBS")
            self._call([cmake, "--build", str(folder), *(["-j", jobs] if jobs else [])])
            package.mkdir(parents=True, exist_ok=True)
            for library in sorted((folder / "out").glob("*.so")):
                replace_file(library, package / library.name)

    def _call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"the native build failed ({error.returncode}): {' '.join(command)}") from None

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tagged for every Python 3: the tensor library needs none in particular; fastdl._native does, but is optional."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def replace_file(source: Path, target: Path) -> None:
    """Copy under a temporary name, then rename: a process that has the old library mapped keeps it."""
    if target.exists() and target.read_bytes() == source.read_bytes():
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, temporary)
    os.replace(temporary, target)


if __name__ == "__main__":
    # Asked before pip resolves dependencies, which would download several GB for a build that then fails.
    if {"dist_info", "editable_wheel", "bdist_wheel", "build_ext", "install", "develop"} & set(sys.argv):
        require_torch()
    setup(
        # The top-level folder kernels/ is installed inside the package; in the source tree a link stands there.
        packages=sorted({*find_packages(include=["fastdl", "fastdl.*"]), "fastdl.kernels"}),
        package_dir={"fastdl.kernels": "kernels"},
        ext_modules=[Extension("fastdl._native", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
