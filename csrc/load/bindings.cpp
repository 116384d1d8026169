#include <pybind11/pybind11.h>
PYBIND11_MODULE(_load, module) { module.doc() = "placeholder"; }
