// The Python module of the CUDA kernels, which the CUDA runtime is linked into: apart from
// `_native`, so that this one works wherever it was built.
#include <initializer_list>
#include <optional>
#include <type_traits>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kvpo/tve_grpo.h"
#include "trajectories.h"

namespace py = pybind11;
using kvpo::dlpack::kFloat;
using kvpo::dlpack::View;

namespace {

// A contiguous array on a GPU.
template <typename T>
T* on_gpu(const py::capsule& capsule, std::initializer_list<int64_t> shape, const char* name) {
  const View view(capsule, name);
  KVPO_CHECK(view.device() == kvpo::dlpack::kCuda, std::string(name) + " must be on a GPU");
  const uint8_t code = std::is_integral_v<T> ? kvpo::dlpack::kInt : kFloat;
  return view.expect(shape).contiguous().data<T>(code);
}

// Tensors of one GPU, the current one; on the stream whose handle is given.
void tve_grpo(const py::capsule& pred, const py::capsule& target, const py::capsule& weights,
              const py::capsule& grad_weights, const py::capsule& old,
              const py::capsule& advantages, const py::capsule& ref, double clip_low,
              double clip_high, double kl_coef, double log_ratio_clamp, double min_entropy_ratio,
              double scale, double branch_mass, bool drop, const py::capsule& numbers,
              const std::optional<py::capsule>& grad, const py::capsule& partials,
              const py::capsule& coefficients, const py::capsule& arrived, uintptr_t stream) {
  const View p(pred, "pred"), t(target, "target");
  KVPO_CHECK(p.device() == kvpo::dlpack::kCuda && t.device() == p.device(),
             "pred and target must be on a GPU");
  const auto x = kvpo::trajectories(p, t, 0);
  const int64_t G = x.branches, S = x.steps, size = View(weights, "weights").size(0);
  constexpr int64_t chunk = kvpo::cuda::kChunk, rows = kvpo::kBranchRows + 1;
  const kvpo::cuda::TveGrpo args{
      x,
      on_gpu<double>(weights, {size}, "weights"),
      on_gpu<double>(grad_weights, {size}, "grad_weights"),
      kvpo::weights_stride(x, size, "weights"),
      {clip_low, clip_high, kl_coef, log_ratio_clamp, min_entropy_ratio, scale, branch_mass, drop},
      on_gpu<float>(old, {G}, "old_scores"),
      on_gpu<float>(advantages, {G}, "advantages"),
      on_gpu<float>(ref, {G}, "ref_scores"),
      on_gpu<double>(partials, {G * S * ((x.numel + chunk - 1) / chunk)}, "partials"),
      on_gpu<float>(coefficients, {G, S}, "coefficients"),
      on_gpu<int>(arrived, {1}, "arrived"),
      on_gpu<float>(numbers, {kvpo::kStatistics + rows * G}, "numbers"),
      grad ? kvpo::gradient_data(View(*grad, "grad"), p) : nullptr};
  py::gil_scoped_release release;
  kvpo::cuda::tve_grpo(args, reinterpret_cast<void*>(stream));
}

} // namespace

PYBIND11_MODULE(_cuda, m) {
  py::register_local_exception<kvpo::Error>(m, "Error", PyExc_ValueError);
  py::register_local_exception<kvpo::CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.attr("CHUNK") = kvpo::cuda::kChunk;
  m.def("tve_grpo", &tve_grpo);
}
