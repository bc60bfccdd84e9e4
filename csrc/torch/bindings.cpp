// The extension module: importing it registers the CUDA operators; build_info() says what this build holds.
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <sstream>
#include <string>

#include "flash.h"
#include "torch/operators.h"

TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  m.impl("fwd", &flash::fwd);
  m.impl("bwd", &flash::bwd);
  m.impl("bwd_into", &flash::bwd_into);
  m.impl("varlen_fwd", &flash::varlen_fwd);
  m.impl("varlen_bwd", &flash::varlen_bwd);
  m.impl("varlen_bwd_into", &flash::varlen_bwd_into);
  m.impl("draw_rng_state", &flash::draw_rng_state);
  m.impl("attn_probs", &flash::attn_probs);
}

namespace {

pybind11::list split(char const* text, bool as_integers) {
  pybind11::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    if (as_integers) {
      parts.append(std::stoi(part));
    } else {
      parts.append(part);
    }
  }
  return parts;
}

pybind11::dict build_info() {
  flash::BuildInfo const info = flash::build_info();
  pybind11::dict result;
  result["archs"]     = split(info.archs, true);
  result["head_dims"] = split(info.head_dims, true);
  result["dtypes"]    = split(info.dtypes, false);
  result["families"]  = split(info.families, false);
  result["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  result["cutlass_version"] = std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) +
                              "." + std::to_string(CUTLASS_PATCH);
  return result;
}

}  // namespace

PYBIND11_MODULE(flash_attn_2_cuda, m) {
  m.doc() = "CUDA kernels of flash_attn; importing registers the operators torch.ops.flash_attn.*";
  m.def(
      "build_info", &build_info,
      "What this build holds: archs, head_dims, dtypes, families, cuda_version, cutlass_version.");
}
