#include "kvpo/peak_flops.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_peak_flops(py::module_& m) {
  m.def(
      "peak_flops",
      [](bool pairs, int threads, int64_t iterations) {
        double operations = 0;
        py::gil_scoped_release unlocked;
        kvpo::cpu::peak_flops({pairs, threads < 1 ? 1 : threads, iterations, &operations});
        return operations;
      },
      py::kw_only(), py::arg("pairs"), py::arg("threads"), py::arg("iterations"));
}
