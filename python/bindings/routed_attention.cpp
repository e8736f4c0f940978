#include "kvpo/routed_attention.h"

#include <optional>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dlpack.h"
#include "pool.h"

namespace py = pybind11;
using kvpo::RoutedAttentionBackward;
using kvpo::RoutedAttentionForward;
using kvpo::dlpack::View;

namespace {

// A [outer, token, head, D] argument of q's dtype, or of a quantized pool.
class Vectors {
public:
  Vectors(const py::capsule& capsule, const char* name, std::initializer_list<int64_t> shape,
          kvpo::Float dtype, kvpo::Page page = kvpo::Page::kAsQueries)
      : view_(capsule, name) {
    view_.expect(shape);
    KVPO_CHECK(kvpo::page_of(view_) == page &&
                   (page != kvpo::Page::kAsQueries || kvpo::float_of(view_, "q") == dtype),
               std::string(name) + " has another dtype than q");
    KVPO_CHECK(view_.device() == kvpo::dlpack::kCpu, std::string(name) + " is not on the CPU");
    KVPO_CHECK(view_.stride(3) == 1 || view_.size(3) == 1 || view_.empty(),
               std::string(name) + ": the last axis must be contiguous");
  }
  operator kvpo::HeadVectors() const {
    return {view_.data(), view_.stride(0), view_.stride(1), view_.stride(2)};
  }
  void* contiguous() const { return view_.contiguous().data(); }

private:
  View view_;
};

using Scales = std::optional<py::capsule>;

RoutedAttentionForward arguments(const py::capsule& q, const py::capsule& k_pool,
                                 const py::capsule& v_pool, const py::capsule& slots,
                                 const py::capsule& k_live, const py::capsule& v_live,
                                 const Scales& k_scales, const Scales& v_scales,
                                 const py::capsule& out, const py::capsule& lse, double scale,
                                 int threads) {
  using namespace kvpo::dlpack;
  const View q_view(q, "q"), pool(k_pool, "k_pool"), live(k_live, "k_live"), table(slots, "slots");
  KVPO_CHECK(q_view.rank() == 4 && pool.rank() == 4 && live.rank() == 4 && table.rank() == 2,
             "wrong rank");
  const int64_t B = q_view.size(0), Q = q_view.size(1), H = q_view.size(2), D = q_view.size(3);
  const int64_t F = pool.size(0), T = pool.size(1), Hkv = pool.size(2), L = live.size(1);
  KVPO_CHECK(D > 0 && D % 16 == 0 && D <= 256 && Hkv > 0 && H % Hkv == 0,
             "unsupported heads or head size");
  const kvpo::Float dtype = kvpo::float_of(q_view, "q");

  RoutedAttentionForward a{};
  a.shape = {B, Q, H, Hkv, D, F, T, table.size(1), L};
  a.dtype = dtype;
  a.scale = static_cast<float>(scale);
  a.threads = threads < 1 ? 1 : threads;
  a.q = Vectors(q, "q", {B, Q, H, D}, dtype);
  a.page = kvpo::page_of(pool);
  a.k_pool = Vectors(k_pool, "k_pool", {F, T, Hkv, D}, dtype, a.page);
  a.v_pool = Vectors(v_pool, "v_pool", {F, T, Hkv, D}, dtype, a.page);
  if (a.page != kvpo::Page::kAsQueries) {
    KVPO_CHECK(k_scales && v_scales, "a quantized pool needs scales");
    const auto scales = [&](const py::capsule& capsule, const char* name) {
      return View(capsule, name).contiguous().expect({F, Hkv}).data<float>(kFloat);
    };
    a.k_scales = scales(*k_scales, "k_scales");
    a.v_scales = scales(*v_scales, "v_scales");
  }
  a.k_live = Vectors(k_live, "k_live", {B, L, Hkv, D}, dtype);
  a.v_live = Vectors(v_live, "v_live", {B, L, Hkv, D}, dtype);
  a.slots = table.contiguous().expect({B, table.size(1)}).data<int32_t>(kInt);
  a.out = Vectors(out, "out", {B, Q, H, D}, dtype).contiguous();
  a.lse = View(lse, "lse").contiguous().expect({B, H, Q}).data<float>(kFloat);
  return a;
}

} // namespace

void bind_routed_attention(py::module_& m) {
  m.def(
      "routed_attention_forward",
      [](const py::capsule& q, const py::capsule& k_pool, const py::capsule& v_pool,
         const py::capsule& slots, const py::capsule& k_live, const py::capsule& v_live,
         const Scales& k_scales, const Scales& v_scales, const py::capsule& out,
         const py::capsule& lse, double scale, int threads) {
        const RoutedAttentionForward a = arguments(q, k_pool, v_pool, slots, k_live, v_live,
                                                   k_scales, v_scales, out, lse, scale, threads);
        py::gil_scoped_release unlocked;
        kvpo::cpu::routed_attention_forward(a);
      },
      py::kw_only(), py::arg("q"), py::arg("k_pool"), py::arg("v_pool"), py::arg("slots"),
      py::arg("k_live"), py::arg("v_live"), py::arg("k_scales"), py::arg("v_scales"),
      py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("threads"));
  m.def(
      "routed_attention_backward",
      [](const py::capsule& grad_out, const py::capsule& q, const py::capsule& k_pool,
         const py::capsule& v_pool, const py::capsule& slots, const py::capsule& k_live,
         const py::capsule& v_live, const Scales& k_scales, const Scales& v_scales,
         const py::capsule& out, const py::capsule& lse, const py::capsule& grad_q,
         const py::capsule& grad_k_live, const py::capsule& grad_v_live, double scale,
         int threads) {
        RoutedAttentionBackward b{};
        b.forward = arguments(q, k_pool, v_pool, slots, k_live, v_live, k_scales, v_scales, out,
                              lse, scale, threads);
        const auto& s = b.forward.shape;
        const auto dtype = b.forward.dtype;
        const auto like_q = {s.rows, s.queries, s.heads, s.head_size};
        const auto like_live = {s.rows, s.live_tokens, s.kv_heads, s.head_size};
        b.grad_out = Vectors(grad_out, "grad_out", like_q, dtype);
        b.grad_q = Vectors(grad_q, "grad_q", like_q, dtype).contiguous();
        b.grad_k_live = Vectors(grad_k_live, "grad_k_live", like_live, dtype).contiguous();
        b.grad_v_live = Vectors(grad_v_live, "grad_v_live", like_live, dtype).contiguous();
        py::gil_scoped_release unlocked;
        kvpo::cpu::routed_attention_backward(b);
      },
      py::kw_only(), py::arg("grad_out"), py::arg("q"), py::arg("k_pool"), py::arg("v_pool"),
      py::arg("slots"), py::arg("k_live"), py::arg("v_live"), py::arg("k_scales"),
      py::arg("v_scales"), py::arg("out"), py::arg("lse"), py::arg("grad_q"),
      py::arg("grad_k_live"), py::arg("grad_v_live"), py::arg("scale"), py::arg("threads"));
}
