// Stub.
#include <pybind11/pybind11.h>

void bind_tve_grpo(pybind11::module_&) {}
