// fastdl._native: what is no tensor. Build facts are compiled in; CPU facts are asked of the tensor library, because a
// process has one level cap and it lives there.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "fastdl_build_info.h"
#include "fastdl_schema_hash.h"

namespace py = pybind11;

namespace {

void* library = nullptr;

template <class Function>
Function lookup(const char* symbol) {
  if (!library)
    throw std::runtime_error("no tensor library attached: call attach(path) after torch.ops.load_library(path)");
  void* found = dlsym(library, symbol);
  if (!found) throw std::runtime_error(std::string("the tensor library has no ") + symbol);
  return reinterpret_cast<Function>(found);
}

void attach(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) throw std::runtime_error(path + " is not loaded");
  library = handle;
}

std::string cpu_level() { return lookup<const char* (*)()>("fastdl_cpu_level")(); }
std::string cpu_features() { return lookup<const char* (*)()>("fastdl_cpu_features")(); }

void set_level_cap(const std::string& name) {
  if (lookup<int (*)(const char*)>("fastdl_set_level_cap")(name.c_str()) != 0)
    throw py::value_error("unknown CPU level '" + name + "'");
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = FASTDL_BUILD_COMPILER;
  info["flags"] = FASTDL_BUILD_FLAGS;
  info["levels"] = FASTDL_BUILD_LEVELS;
  info["cuda"] = FASTDL_BUILD_CUDA;
  info["cuda_archs"] = FASTDL_BUILD_CUDA_ARCHS;
  info["torch"] = FASTDL_BUILD_TORCH;
  info["schema_hash"] = FASTDL_SCHEMA_HASH;
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts, CPU features and the level cap of fastdl.";
  m.def("build_info", &build_info,
        "How this binary was built: compiler, flags, levels, cuda, cuda_archs, torch, schema_hash.");
  m.def("attach", &attach, py::arg("path"), "Use the tensor library at this path, which must be loaded already.");
  m.def("cpu_level", &cpu_level, "Level in use: scalar, avx2, avx512, amx or amx-twin.");
  m.def("cpu_features", &cpu_features, "Comma list of what the CPU has.");
  m.def("set_level_cap", &set_level_cap, py::arg("name"), "Highest level to use from now on.");
}
