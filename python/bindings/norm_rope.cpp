// Stub.
#include <pybind11/pybind11.h>

void bind_norm_rope(pybind11::module_&) {}
