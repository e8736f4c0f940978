// Stub.
#include <pybind11/pybind11.h>

void bind_routed_attention(pybind11::module_&) {}
