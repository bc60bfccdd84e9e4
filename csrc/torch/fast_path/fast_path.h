#pragma once
// The usual calls' way past Python's share of the time.  Measured on a slow host, forward and backward of one small call take
//   133 us this way, 164 us with the arguments checked in Python, 194 us with autograd in Python too; the forward alone 12 and 23 us.
// flash_attn/flash_attn_interface.py tries it first; nothing else knows of it.
#include <torch/csrc/python_headers.h>

namespace flash {

// The arguments of flash_attn_func, positional and all given.  Returns out, or None for what only Python serves: it then checks the
// arguments, and pads, copies and converts them.  For METH_FASTCALL.
PyObject* fast_attend(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// The same of flash_attn_varlen_func.
PyObject* fast_varlen_attend(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace flash
