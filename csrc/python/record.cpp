// Reads the autograd graph of a run for fastjac/input_jacobian/chain/signature.py, which has the
// same function in Python. There it takes 5 µs an operation, here 3
// (AMD EPYC, python -m benchmarks.host_costs).
//
// An extension module of the stable ABI of Python: one binary for every version from 3.10 on.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <unordered_map>
#include <vector>

namespace {

struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// Thrown when Python has set an error.
struct Raised {};

Owned owned(PyObject* object) {
  if (object == nullptr) throw Raised{};
  return Owned(object);
}

void check(int result) {
  if (result < 0) throw Raised{};
}

struct Names {
  PyObject* operator()(const char* name) { return PyUnicode_InternFromString(name); }
  PyObject* variable = (*this)("variable");
  PyObject* next_functions = (*this)("next_functions");
  PyObject* sequence_nr = (*this)("_sequence_nr");
  PyObject* unpack_hook = (*this)("unpack_hook");
  PyObject* input_metadata = (*this)("_input_metadata");
  PyObject* saved_tensors = (*this)("saved_tensors");
  PyObject* dict = (*this)("__dict__");
  PyObject* forward_hooks = (*this)("_forward_hooks");
  PyObject* modules = (*this)("_modules");
  PyObject* backward_hooks = (*this)("_backward_hooks");
  PyObject* grad_fn = (*this)("grad_fn");
  PyObject* data_ptr = (*this)("data_ptr");
  PyObject* shape = (*this)("shape");
  PyObject* stride = (*this)("stride");
  PyObject* dtype = (*this)("dtype");
  PyObject* device = (*this)("device");
  PyObject* is_cpu = (*this)("is_cpu");
  PyObject* requires_grad = (*this)("requires_grad");
  PyObject* element_size = (*this)("element_size");
};

Names& names() {
  static Names all;
  return all;
}

Owned attribute(PyObject* object, PyObject* name) { return owned(PyObject_GetAttr(object, name)); }

bool is_true(PyObject* object, PyObject* name) {
  const int result = PyObject_IsTrue(attribute(object, name).get());
  check(result);
  return result == 1;
}

Owned call(PyObject* object, PyObject* name) {
  return owned(PyObject_CallMethodObjArgs(object, name, nullptr));
}

class Reader {
 public:
  Reader(PyObject* x, PyObject* source, long source_nr, long long start, PyObject* kinds,
         PyObject* plain, Py_ssize_t alone)
      : x(x),
        source(source),
        source_nr(source_nr),
        start(start),
        kinds(kinds),
        plain(plain),
        alone(alone) {}

  // Returns (key, tensors, leaves, leaf nodes, source, private), or (None, a node of an unknown
  // type) or (None, a text) if the graph cannot be read.
  Owned read(PyObject* end, long end_nr) {
    append(owned(PyLong_FromLong(end_nr)));
    tensor(x);
    number(end);
    for (size_t i = 0; i < nodes.size(); ++i) {
      PyObject* node = nodes[i].get();
      PyObject* kind = PyDict_GetItemWithError(kinds, reinterpret_cast<PyObject*>(Py_TYPE(node)));
      if (kind == nullptr) {
        if (PyErr_Occurred() != nullptr) throw Raised{};
        return owned(PyTuple_Pack(2, Py_None, node));
      }
      add(reinterpret_cast<PyObject*>(Py_TYPE(node)));
      const bool readable = PyTuple_GetItem(kind, 0) == Py_True ? leaf(node) : inner(node, kind);
      if (!readable) return owned(Py_BuildValue("Os", Py_None, why));
    }
    const Owned tuple = owned(PyList_AsTuple(key.get()));
    PyObject* found = source == nullptr ? Py_None : source;
    return owned(PyTuple_Pack(6, tuple.get(), tensors.get(), leaves.get(), ends.get(), found,
                              hidden ? Py_True : Py_False));
  }

 private:
  void add(PyObject* object) { check(PyList_Append(key.get(), object)); }
  void append(const Owned& object) { add(object.get()); }

  // The number of a node; a new one is read later.
  long number(PyObject* node) {
    const auto [place, fresh] = numbers.try_emplace(node, long(nodes.size()));
    if (fresh) {
      Py_INCREF(node);
      nodes.emplace_back(node);
    }
    return place->second;
  }

  bool leaf(PyObject* node) {
    const Owned variable = attribute(node, names().variable);
    if (variable.get() == x) {
      if (source == nullptr) source = node;
      append(owned(PyLong_FromLong(-2)));
      return true;
    }
    if (!is_plain(variable.get())) return refuse("a leaf of the graph is of a subclass of Tensor");
    const Owned hooks = attribute(variable.get(), names().backward_hooks);
    if (hooks.get() != Py_None) hidden = false;
    check(PyList_Append(leaves.get(), variable.get()));
    check(PyList_Append(ends.get(), node));
    append(attribute(variable.get(), names().shape));
    append(attribute(variable.get(), names().dtype));
    append(attribute(variable.get(), names().device));
    return true;
  }

  // kind: (is a leaf, is of fastjac, raw names, names of tensors, names of options, has shapes,
  // does not show the sizes of constants)
  bool inner(PyObject* node, PyObject* kind) {
    const int constants = edges(node);
    if (constants > 1 && PyTuple_GetItem(kind, 6) == Py_True) {
      return refuse("torch.cat has several operands that do not require grad");
    }
    const Owned order = call(node, names().sequence_nr);
    if (PyLong_AsLongLong(order.get()) < start) hidden = false;
    PyObject* raw = PyTuple_GetItem(kind, 2);
    for (Py_ssize_t i = 0; i < PyTuple_Size(raw); ++i) {
      const Owned saved = attribute(node, PyTuple_GetItem(raw, i));
      if (!PyTuple_Check(saved.get())) {
        if (hooked(saved.get())) return refuse("tensors are saved under hooks (a checkpoint)");
        continue;
      }
      for (Py_ssize_t j = 0; j < PyTuple_Size(saved.get()); ++j) {
        if (hooked(PyTuple_GetItem(saved.get(), j))) {
          return refuse("tensors are saved under hooks (a checkpoint)");
        }
      }
    }
    PyObject* given = PyTuple_GetItem(kind, 3);
    for (Py_ssize_t i = 0; i < PyTuple_Size(given); ++i) {
      if (!saved(attribute(node, PyTuple_GetItem(given, i)))) return false;
    }
    PyObject* options = PyTuple_GetItem(kind, 4);
    for (Py_ssize_t i = 0; i < PyTuple_Size(options); ++i) {
      append(attribute(node, PyTuple_GetItem(options, i)));
    }
    if (PyTuple_GetItem(kind, 1) == Py_True) {
      if (!saved(attribute(node, names().saved_tensors))) return false;
      const Owned dict = attribute(node, names().dict);
      append(owned(PySequence_Tuple(owned(PyDict_Items(dict.get())).get())));
    }
    if (PyTuple_GetItem(kind, 5) == Py_True) shapes(node);
    return true;
  }

  // Returns how many inputs do not require grad.
  int edges(PyObject* node) {
    int constants = 0;
    const Owned following = attribute(node, names().next_functions);
    for (Py_ssize_t i = 0; i < PyTuple_Size(following.get()); ++i) {
      PyObject* edge = PyTuple_GetItem(following.get(), i);
      PyObject* next = PyTuple_GetItem(edge, 0);
      const long nr = PyLong_AsLong(PyTuple_GetItem(edge, 1));
      if (next == Py_None) {
        ++constants;
        append(owned(PyLong_FromLong(-1)));
      } else if (next == source && nr == source_nr) {
        append(owned(PyLong_FromLong(-2)));
      } else {
        append(owned(PyLong_FromLong(number(next))));
        if (nr != 0) append(owned(Py_BuildValue("(l)", nr)));
      }
    }
    return constants;
  }

  static bool hooked(PyObject* saved) {
    return attribute(saved, names().unpack_hook).get() != Py_None;
  }

  void shapes(PyObject* node) {
    const Owned outputs = attribute(node, names().input_metadata);
    const Owned tuple = owned(PySequence_Tuple(outputs.get()));
    for (Py_ssize_t i = 0; i < PyTuple_Size(tuple.get()); ++i) {
      PyObject* output = PyTuple_GetItem(tuple.get(), i);
      append(attribute(output, names().dtype));
      append(owned(PySequence_Tuple(attribute(output, names().shape).get())));
    }
  }

  bool is_plain(PyObject* t) const {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
    return type == PyTuple_GetItem(plain, 0) || type == PyTuple_GetItem(plain, 1);
  }

  // A tensor, None or a tuple of such. The caller has one reference.
  bool saved(const Owned& object) {
    if (object.get() == Py_None) {
      add(Py_None);
      return true;
    }
    if (PyTuple_Check(object.get())) {
      for (Py_ssize_t i = 0; i < PyTuple_Size(object.get()); ++i) {
        PyObject* part = PyTuple_GetItem(object.get(), i);
        if (part == Py_None) {
          add(Py_None);
        } else if (!tensor(part)) {
          return false;
        }
      }
      return true;
    }
    return tensor(object.get());
  }

  bool tensor(PyObject* t) {
    if (!is_plain(t)) return refuse("a tensor of the graph is of a subclass of Tensor");
    if (hidden && Py_REFCNT(t) > alone && t != x && seen_elsewhere(t)) hidden = false;
    const Owned address = call(t, names().data_ptr);
    const long long memory = PyLong_AsLongLong(address.get());
    const Py_ssize_t place = PyList_Size(tensors.get());
    append(owned(PyLong_FromSsize_t(places.try_emplace(memory, place).first->second)));
    const Owned shape = attribute(t, names().shape);
    add(shape.get());
    append(call(t, names().stride));
    append(attribute(t, names().dtype));
    check(PyList_Append(tensors.get(), t));
    if (PyTuple_Size(shape.get()) == 0 && is_true(t, names().is_cpu) &&
        !is_true(t, names().requires_grad)) {  // a number of Python is a constant of a trace
      const long size = PyLong_AsLong(call(t, names().element_size).get());
      append(owned(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(memory), size)));
    }
    return true;
  }

  // Whether there are references to a computed tensor beside those of the graph and of the reader.
  bool seen_elsewhere(PyObject* t) const {
    if (attribute(t, names().grad_fn).get() == Py_None) return false;
    Py_ssize_t own = 0;
    for (Py_ssize_t i = 0; i < PyList_Size(tensors.get()); ++i) {
      own += PyList_GetItem(tensors.get(), i) == t;
    }
    return Py_REFCNT(t) > alone + own;
  }

  bool refuse(const char* reason) {
    why = reason;
    return false;
  }

  PyObject* x;
  PyObject* source;  // the node of x; null until it is found, if x is a leaf
  long source_nr;
  long long start;
  PyObject* kinds;
  PyObject* plain;
  Py_ssize_t alone;

  Owned key = owned(PyList_New(0)), tensors = owned(PyList_New(0)), leaves = owned(PyList_New(0)),
        ends = owned(PyList_New(0));
  std::vector<Owned> nodes;
  std::unordered_map<PyObject*, long> numbers;
  std::unordered_map<long long, Py_ssize_t> places;  // by address
  bool hidden = true;                                // whether nobody else sees the tensors
  const char* why = nullptr;
};

PyObject* read(PyObject*, PyObject* args) {
  PyObject *x, *source, *end, *kinds, *plain;
  long source_nr, end_nr;
  long long start;
  Py_ssize_t alone;
  if (!PyArg_ParseTuple(args, "OOlOlLOOn", &x, &source, &source_nr, &end, &end_nr, &start, &kinds,
                        &plain, &alone)) {
    return nullptr;
  }
  try {
    if (source == Py_None) source = nullptr;
    return Reader(x, source, source_nr, start, kinds, plain, alone).read(end, end_nr).release();
  } catch (const Raised&) {
    return nullptr;
  }
}

// Whether a value, or one in it if it is a list, a tuple or a dictionary, is a computed tensor.
bool holds_tensor(PyObject* value, PyObject* type, bool inside = false) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(value)) == type) {
    return attribute(value, names().grad_fn).get() != Py_None;
  }
  if (inside) return false;
  Owned items;
  if (PyList_Check(value) || PyTuple_Check(value)) {
    items = owned(PySequence_Tuple(value));
  } else if (PyDict_Check(value)) {
    items = owned(PySequence_Tuple(owned(PyDict_Values(value)).get()));
  } else {
    return false;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(items.get()); ++i) {
    if (holds_tensor(PyTuple_GetItem(items.get(), i), type, true)) return true;
  }
  return false;
}

// Whether a module or one inside it has an attribute that holds a computed tensor, or has forward
// hooks, which could have kept one.
bool module_keeps(PyObject* module, PyObject* type) {
  const Owned state = attribute(module, names().dict);
  PyObject *key, *value;
  Py_ssize_t place = 0;
  while (PyDict_Next(state.get(), &place, &key, &value)) {
    if (value == Py_None || value == Py_True || value == Py_False || PyLong_Check(value)) continue;
    const bool dictionary = PyDict_Check(value);
    if (dictionary && PyUnicode_Compare(key, names().forward_hooks) == 0) {
      if (PyDict_Size(value) > 0) return true;
    } else if (dictionary && PyUnicode_Compare(key, names().modules) == 0) {
      PyObject *name, *child;
      Py_ssize_t at = 0;
      while (PyDict_Next(value, &at, &name, &child)) {
        if (child != Py_None && module_keeps(child, type)) return true;
      }
    } else if (!(dictionary && PyDict_Size(value) == 0) && holds_tensor(value, type)) {
      return true;
    }
  }
  return false;
}

PyObject* keeps(PyObject*, PyObject* args) {
  PyObject *module, *type;
  if (!PyArg_ParseTuple(args, "OO", &module, &type)) return nullptr;
  try {
    return PyBool_FromLong(module_keeps(module, type));
  } catch (const Raised&) {
    return nullptr;
  }
}

// The references to the attribute of an object while the caller holds one.
PyObject* references(PyObject*, PyObject* args) {
  PyObject *object, *name;
  if (!PyArg_ParseTuple(args, "OO", &object, &name)) return nullptr;
  const Owned found(PyObject_GetAttr(object, name));
  return found == nullptr ? nullptr : PyLong_FromSsize_t(Py_REFCNT(found.get()));
}

PyMethodDef methods[] = {
    {"read", read, METH_VARARGS, "See fastjac.input_jacobian.chain.signature."},
    {"keeps", keeps, METH_VARARGS, "See fastjac.input_jacobian.chain.signature."},
    {"references", references, METH_VARARGS, "The references to an attribute, one of them here."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_record", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__record() { return PyModule_Create(&definition); }
