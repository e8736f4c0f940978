#include "kvpo/norm_rope.h"

#include <pybind11/pybind11.h>

#include "dlpack.h"
#include "pool.h"

namespace py = pybind11;
using kvpo::NormRopeForward;
using kvpo::dlpack::kFloat;
using kvpo::dlpack::View;

namespace {

// Data of a contiguous [B, N, H, D] argument of x's dtype.
void* like(const View& view, const kvpo::NormRopeShape& s, bool bfloat16) {
  view.contiguous().expect({s.rows, s.tokens, s.heads, s.head_size});
  KVPO_CHECK(view.is(bfloat16 ? kvpo::dlpack::kBfloat : kFloat, bfloat16 ? 16 : 32),
             "a tensor has another dtype than x");
  return view.data();
}

NormRopeForward arguments(const py::capsule& x, const py::capsule& weight, const py::capsule& cos,
                          const py::capsule& sin, double eps, int threads) {
  const View view(x, "x");
  KVPO_CHECK(view.rank() == 4 && view.device() == kvpo::dlpack::kCpu, "`x` has the wrong rank");
  NormRopeForward a{};
  a.shape = {view.size(0), view.size(1), view.size(2), view.size(3)};
  const int64_t D = a.shape.head_size;
  KVPO_CHECK(D % 16 == 0 && D <= 1024, "unsupported head size");
  a.bfloat16 = view.is(kvpo::dlpack::kBfloat, 16);
  a.eps = static_cast<float>(eps);
  a.threads = threads < 1 ? 1 : threads;
  a.x = like(view, a.shape, a.bfloat16);
  a.weight = View(weight, "weight").contiguous().expect({a.shape.heads * D}).data<float>(kFloat);
  a.cos = View(cos, "cos").contiguous().expect({a.shape.tokens, D / 2}).data<float>(kFloat);
  a.sin = View(sin, "sin").contiguous().expect({a.shape.tokens, D / 2}).data<float>(kFloat);
  return a;
}

kvpo::PoolPages pages(const py::capsule& pool, const char* name, const NormRopeForward& a,
                      int64_t frame_tokens) {
  const View view(pool, name);
  view.expect({view.size(0), frame_tokens, a.shape.heads, a.shape.head_size});
  KVPO_CHECK(view.is(a.bfloat16 ? kvpo::dlpack::kBfloat : kFloat, a.bfloat16 ? 16 : 32) &&
                 view.stride(3) == 1,
             std::string(name) + " has another dtype than x, or a strided last axis");
  return {view.data(), view.stride(0), view.stride(1), view.stride(2)};
}

} // namespace

void bind_norm_rope(py::module_& m) {
  m.def(
      "norm_rope_forward",
      [](const py::capsule& x, const py::capsule& weight, const py::capsule& cos,
         const py::capsule& sin, const py::capsule& out, double eps, int threads) {
        NormRopeForward a = arguments(x, weight, cos, sin, eps, threads);
        a.out = like(View(out, "out"), a.shape, a.bfloat16);
        py::gil_scoped_release unlocked;
        kvpo::cpu::norm_rope_forward(a);
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("cos"), py::arg("sin"),
      py::arg("out"), py::arg("eps"), py::arg("threads"));
  m.def(
      "norm_rope_backward",
      [](const py::capsule& grad, const py::capsule& x, const py::capsule& weight,
         const py::capsule& cos, const py::capsule& sin, const py::capsule& grad_x,
         const py::capsule& grad_weight, double eps, int threads) {
        kvpo::NormRopeBackward b{};
        b.forward = arguments(x, weight, cos, sin, eps, threads);
        const auto& s = b.forward.shape;
        b.grad = like(View(grad, "grad"), s, b.forward.bfloat16);
        b.grad_x = like(View(grad_x, "grad_x"), s, b.forward.bfloat16);
        b.grad_weight = View(grad_weight, "grad_weight")
                            .contiguous()
                            .expect({s.heads * s.head_size})
                            .data<float>(kFloat);
        py::gil_scoped_release unlocked;
        kvpo::cpu::norm_rope_backward(b);
      },
      py::kw_only(), py::arg("grad"), py::arg("x"), py::arg("weight"), py::arg("cos"),
      py::arg("sin"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("eps"),
      py::arg("threads"));
  m.def(
      "norm_rope_write",
      [](const py::capsule& x, const py::capsule& weight, const py::capsule& cos,
         const py::capsule& sin, const py::capsule& v, const py::capsule& k_pool,
         const py::capsule& v_pool, const py::capsule& slots, double eps, int threads) {
        kvpo::NormRopeWrite w{};
        w.keys = arguments(x, weight, cos, sin, eps, threads);
        const auto& s = w.keys.shape;
        w.v = like(View(v, "v"), s, w.keys.bfloat16);
        const View table(slots, "slots");
        KVPO_CHECK(table.rank() == 2 && table.size(1) > 0 && s.tokens % table.size(1) == 0,
                   "`slots` does not divide the tokens");
        w.frame_tokens = s.tokens / table.size(1);
        table.contiguous().expect({s.rows, table.size(1)});
        w.slots = table.data<int64_t>(kvpo::dlpack::kInt);
        w.k_pool = pages(k_pool, "k_pool", w.keys, w.frame_tokens);
        w.v_pool = pages(v_pool, "v_pool", w.keys, w.frame_tokens);
        const int64_t slots_of_k = View(k_pool, "k_pool").size(0);
        KVPO_CHECK(slots_of_k == View(v_pool, "v_pool").size(0), "the pools differ in slots");
        kvpo::check_slots(w.slots, s.rows * table.size(1), slots_of_k);
        py::gil_scoped_release unlocked;
        kvpo::cpu::norm_rope_write(w);
      },
      py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("cos"), py::arg("sin"), py::arg("v"),
      py::arg("k_pool"), py::arg("v_pool"), py::arg("slots"), py::arg("eps"), py::arg("threads"));
}
