#pragma once
// flash_attn_func's way past Python's share of the time, for the call that most programs make.
#include <torch/csrc/python_headers.h>

namespace flash {

// The arguments of flash_attn_func, positional and all given.  Returns out, or None for what only Python serves: it then checks the
// arguments, and pads, copies and converts them.  For METH_FASTCALL.
PyObject* attend_common(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace flash
