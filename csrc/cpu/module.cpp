// Makes the shared object importable as resnet_fused._C: importing it registers the ops.
#include <Python.h>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr,
                                   nullptr,               nullptr, nullptr};
  return PyModule_Create(&definition);
}
