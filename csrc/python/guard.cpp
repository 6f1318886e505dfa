// Guard: whether a list of Python objects is still as it was, in a few microseconds.
//
// A fused module must notice at every call when a parameter was replaced or written to, a hook was
// set, a child was exchanged: about a hundred small facts a block. In Python that takes 20 us, and
// 60 within a net whose weights push everything else out of the caches; here 2 when warm. Cold it
// is the loads that count, from a hundred pages: 948 facts of ResNet-18 take 120 us there, 85 when
// what they look at is prefetched.
//
// A fact is (kind, object, key, expected), resnet_fused/guard.py says what each kind demands.
// Written against the limited API, so that one binary serves every Python.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "python/snapshot.h"

namespace {

enum class Kind : long { kIs, kEquals, kAbsent, kLength, kType, kVersion, kReturns, kLies };
constexpr long kKinds = 8;
constexpr int kTableLines = 6;  // the names of a module's attributes

// Borrowed from the tuple of facts that the guard owns.
struct Fact {
  Kind kind;
  PyObject* object;
  PyObject* key;
  PyObject* expected;
  const void* value;  // where object[key] lay when the guard was made: only to be prefetched

  bool looks_up() const {
    return kind == Kind::kIs || kind == Kind::kEquals || kind == Kind::kAbsent ||
           kind == Kind::kLength;
  }
};

struct Guard {
  PyObject_HEAD PyObject* owned;  // a tuple of tuples
  Fact* facts;
  Py_ssize_t count;
};

PyObject* version_name;   // "_version"
PyObject* snapshot_type;  // of this module

// 1, 0, or -1 with an exception set.
int equals(PyObject* value, PyObject* expected) {
  return value == expected ? 1 : PyObject_RichCompareBool(value, expected, Py_EQ);
}

// As `equals`; takes over the reference to `value`, which may be null with an exception set.
int equals_owned(PyObject* value, PyObject* expected) {
  if (value == nullptr) return -1;
  const int result = equals(value, expected);
  Py_DECREF(value);
  return result;
}

int holds(const Fact& fact) {
  switch (fact.kind) {
    case Kind::kType:
      return reinterpret_cast<PyObject*>(Py_TYPE(fact.object)) == fact.expected;
    case Kind::kVersion:
      return equals_owned(PyObject_GetAttr(fact.object, version_name), fact.expected);
    case Kind::kReturns:
      return equals_owned(PyObject_CallNoArgs(fact.object), fact.expected);
    case Kind::kLies:
      return snapshot_holds(reinterpret_cast<const Snapshot*>(fact.object));
    default:
      break;
  }
  PyObject* value = PyDict_GetItemWithError(fact.object, fact.key);  // borrowed
  if (value == nullptr) {
    if (PyErr_Occurred()) return -1;
    return fact.kind == Kind::kAbsent;
  }
  switch (fact.kind) {
    case Kind::kIs:
      return value == fact.expected;
    case Kind::kEquals: {
      Py_INCREF(value);  // a comparison may run anything
      return equals_owned(value, fact.expected);
    }
    case Kind::kLength: {
      const Py_ssize_t length = PyObject_Size(value);
      return length < 0 ? -1 : length == PyLong_AsSsize_t(fact.expected);
    }
    default:
      return 0;
  }
}

// gcc drops calls of functions that do nothing but prefetch.
#define ALWAYS_INLINE __attribute__((always_inline)) inline

ALWAYS_INLINE void prefetch_lines(const void* start, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(start) + 64 * i);
}

// Starts loading what the facts look at, all at once instead of one by one. Where a dict keeps its
// table is CPython's affair: a wrong guess prefetches in vain.
ALWAYS_INLINE void prefetch(const Fact* facts, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    prefetch_lines(facts[i].object, 1);
    prefetch_lines(facts[i].expected, 1);
    prefetch_lines(facts[i].value, 1);
  }
  const PyObject* previous = nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const PyObject* object = facts[i].object;
    if (facts[i].kind == Kind::kLies) {
      prefetch_samples(reinterpret_cast<const Snapshot*>(object));
      continue;
    }
    if (object == previous) continue;
    previous = object;
    const void* const* words = reinterpret_cast<const void* const*>(object);
    if (facts[i].looks_up()) prefetch_lines(words[4], kTableLines);  // a dict's table
  }
}

// Guard(): True while every fact holds; a comparison that raises counts as a change.
PyObject* guard_call(PyObject* self, PyObject*, PyObject*) {
  const Guard* guard = reinterpret_cast<Guard*>(self);
  prefetch(guard->facts, guard->count);
  for (Py_ssize_t i = 0; i < guard->count; ++i) {
    const int result = holds(guard->facts[i]);
    if (result == 1) continue;
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

bool read_fact(PyObject* item, Fact& fact) {
  if (!PyTuple_Check(item) || PyTuple_Size(item) != 4) {
    PyErr_SetString(PyExc_TypeError,
                    "Guard: facts must be tuples of (kind, object, key, expected)");
    return false;
  }
  const long kind = PyLong_AsLong(PyTuple_GetItem(item, 0));
  if (kind == -1 && PyErr_Occurred()) return false;
  if (kind < 0 || kind >= kKinds) {
    PyErr_Format(PyExc_ValueError, "Guard: kind must be at least 0 and below %ld, got %ld", kKinds,
                 kind);
    return false;
  }
  fact = {static_cast<Kind>(kind), PyTuple_GetItem(item, 1), PyTuple_GetItem(item, 2),
          PyTuple_GetItem(item, 3), nullptr};
  if (fact.looks_up()) {
    if (!PyDict_Check(fact.object)) {
      PyErr_SetString(PyExc_TypeError, "Guard: object must be a dict for facts about an item");
      return false;
    }
    fact.value = PyDict_GetItemWithError(fact.object, fact.key);
    PyErr_Clear();  // a key that cannot be looked up: the fact does not hold
  }
  if (fact.kind == Kind::kLies &&
      reinterpret_cast<PyObject*>(Py_TYPE(fact.object)) != snapshot_type) {
    PyErr_SetString(PyExc_TypeError, "Guard: object must be a Snapshot for facts about tensors");
    return false;
  }
  if (fact.kind == Kind::kLength && !PyLong_Check(fact.expected)) {
    PyErr_SetString(PyExc_TypeError, "Guard: expected must be an int for a length");
    return false;
  }
  return true;
}

PyObject* guard_new(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static char facts_name[] = "facts";
  static char* names[] = {facts_name, nullptr};
  PyObject* facts = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "O", names, &facts)) return nullptr;
  Guard* guard = new_owner<Guard>(type, facts);
  if (guard == nullptr) return nullptr;
  PyObject *self = reinterpret_cast<PyObject*>(guard), *owned = guard->owned;
  const Py_ssize_t count = PyTuple_Size(owned);
  guard->facts = static_cast<Fact*>(PyMem_Malloc(sizeof(Fact) * static_cast<size_t>(count + 1)));
  if (guard->facts == nullptr) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!read_fact(PyTuple_GetItem(owned, i), guard->facts[i])) {
      Py_DECREF(self);
      return nullptr;
    }
  }
  guard->count = count;
  return self;
}

// A module keeps its guard, and the guard the module's dicts: only the collector frees that.
int guard_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<Guard*>(self)->owned);
  return 0;
}

int guard_clear(PyObject* self) {
  Guard* guard = reinterpret_cast<Guard*>(self);
  guard->count = 0;
  Py_CLEAR(guard->owned);
  return 0;
}

void guard_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  guard_clear(self);
  PyMem_Free(reinterpret_cast<Guard*>(self)->facts);
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

template <typename Function>
void* slot(Function* function) {
  return reinterpret_cast<void*>(function);
}

// copy and pickle make None of a guard: what it watches is the original's.
PyObject* guard_reduce(PyObject*, PyObject*) {
  return Py_BuildValue("(O())", reinterpret_cast<PyObject*>(Py_TYPE(Py_None)));
}

PyMethodDef guard_methods[] = {{"__reduce__", guard_reduce, METH_NOARGS, "None, when copied."},
                               {nullptr, nullptr, 0, nullptr}};

PyType_Slot guard_slots[] = {
    {Py_tp_doc, const_cast<char*>("Guard(facts)(): whether every fact holds.")},
    {Py_tp_new, slot(guard_new)},
    {Py_tp_call, slot(guard_call)},
    {Py_tp_methods, guard_methods},
    {Py_tp_traverse, slot(guard_traverse)},
    {Py_tp_clear, slot(guard_clear)},
    {Py_tp_dealloc, slot(guard_dealloc)},
    {0, nullptr}};

PyType_Spec guard_spec = {"resnet_fused._guard.Guard", sizeof(Guard), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, guard_slots};

PyType_Slot snapshot_slots[] = {
    {Py_tp_doc, const_cast<char*>("Snapshot(exchange, tensors)(): whether they are as they were.")},
    {Py_tp_new, slot(snapshot_new)},
    {Py_tp_call, slot(snapshot_call)},
    {Py_tp_methods, guard_methods},
    {Py_tp_traverse, slot(snapshot_traverse)},
    {Py_tp_clear, slot(snapshot_clear)},
    {Py_tp_dealloc, slot(snapshot_dealloc)},
    {0, nullptr}};

PyType_Spec snapshot_spec = {"resnet_fused._guard.Snapshot", sizeof(Snapshot), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, snapshot_slots};

PyModuleDef module_def = {PyModuleDef_HEAD_INIT,
                          "_guard",
                          "See csrc/python/guard.cpp.",
                          -1,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__guard() {
  version_name = PyUnicode_InternFromString("_version");
  PyObject* type = version_name == nullptr ? nullptr : PyType_FromSpec(&guard_spec);
  PyObject* module = type == nullptr ? nullptr : PyModule_Create(&module_def);
  if (module == nullptr || PyModule_AddObject(module, "Guard", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(module);
    return nullptr;
  }
  snapshot_type = PyType_FromSpec(&snapshot_spec);
  if (snapshot_type == nullptr || PyModule_AddObject(module, "Snapshot", snapshot_type) < 0) {
    Py_XDECREF(snapshot_type);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
