// The Python module: one bind_<op> per op, in the file of the op's name.
#include <exception>

#include <pybind11/pybind11.h>

#include "isa.h"
#include "kvpo/error.h"
#include "team.h"

namespace py = pybind11;

void bind_routed_attention(py::module_& m);
void bind_tve_grpo(py::module_& m);
void bind_norm_rope(py::module_& m);
void bind_store_frames(py::module_& m);
void bind_peak_flops(py::module_& m);

PYBIND11_MODULE(_native, m) {
  py::register_local_exception<kvpo::Error>(m, "Error", PyExc_ValueError);
  // What callers catch to go on with a smaller batch. By name: the module itself knows no torch.
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown)
        std::rethrow_exception(thrown);
    } catch (const kvpo::OutOfMemory& error) {
      const py::object kind = py::module_::import("torch").attr("OutOfMemoryError");
      PyErr_SetString(kind.ptr(), error.what());
    }
  });
#ifdef _OPENMP
  m.attr("WITH_OPENMP") = true;
#else
  m.attr("WITH_OPENMP") = false;
#endif
#if KVPO_X86
  m.attr("ISAS") = py::make_tuple("portable", "avx2", "avx512", "avx512_bf16");
#else
  m.attr("ISAS") = py::make_tuple("portable");
#endif
  m.def("isa", [] { return std::string(kvpo::cpu::name(kvpo::cpu::isa())); });
  m.def("set_isa_limit", [](const std::string& limit) {
    using kvpo::cpu::Isa;
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16})
      if (limit == kvpo::cpu::name(isa))
        return kvpo::cpu::set_isa_limit(isa);
    throw kvpo::Error("set_isa_limit: unknown instruction set " + limit);
  });
  py::dict thresholds;
  for (int i = 0; i < kvpo::cpu::kWorks; ++i) {
    const auto kind = static_cast<kvpo::cpu::Work>(i);
    thresholds[kvpo::cpu::name(kind)] = kvpo::cpu::least_work(kind);
  }
  m.attr("LEAST_WORK") = thresholds;
  m.def("threads_for", [](const std::string& name, int64_t amount, int threads) {
    for (int i = 0; i < kvpo::cpu::kWorks; ++i)
      if (const auto kind = static_cast<kvpo::cpu::Work>(i); name == kvpo::cpu::name(kind))
        return kvpo::cpu::threads_for(kind, amount, threads);
    throw kvpo::Error("threads_for: unknown kind of work " + name);
  });
  m.def("set_all_threads", &kvpo::cpu::set_all_threads);
  m.def("last_team", &kvpo::cpu::last_team);
  bind_routed_attention(m);
  bind_tve_grpo(m);
  bind_norm_rope(m);
  bind_store_frames(m);
  bind_peak_flops(m);
}
