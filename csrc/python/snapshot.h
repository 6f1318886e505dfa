// Snapshot: whether tensors on the CPU lie where they did, with the sampled values that they had.
//
// `tensor.data.mul_(2)` and writes through numpy change a tensor without raising its version
// counter, `tensor.data = other` puts another in its place. To hand all tensors of ResNet-18's
// parameters to an op that looks takes 180 us within the net, and 360 for ResNet-50's; through
// DLPack's exchange table, which gives a tensor's layout without a reference to it, all of it
// takes 70. Holds no reference to what torch keeps behind the Python object: torch.utils.
// swap_tensors may exchange that.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/samples.h"

namespace {

// As in dlpack.h, version 1.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void* older;
  void *allocate, *to_managed, *from_managed;
  int (*to_tensor)(void* object, DlTensor* tensor);  // may be null
};
constexpr int32_t kDlCpu = 1;

struct Watched {
  PyObject* tensor;  // borrowed from the snapshot's tuple
  std::vector<int64_t> layout;
};

struct Run {
  const char* address;
  size_t bytes;
};

struct Snapshot {
  PyObject_HEAD PyObject* owned;  // a tuple of tensors
  const DlExchange* exchange;
  std::vector<Watched>* watched;
  std::vector<Run>* runs;
  std::vector<char>* sample;
};

// A new object that owns `items` as a tuple, freed with it; null with an exception set.
template <typename Object>
Object* new_owner(PyTypeObject* type, PyObject* items) {
  PyObject* owned = PySequence_Tuple(items);
  if (owned == nullptr) return nullptr;
  const allocfunc allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  Object* object = reinterpret_cast<Object*>(allocate(type, 0));
  if (object == nullptr) {
    Py_DECREF(owned);
    return nullptr;
  }
  object->owned = owned;
  return object;
}

// The layout of a tensor on the CPU; false with an exception set if it is none.
bool read_layout(const DlExchange* exchange, PyObject* object, DlTensor& tensor) {
  if (exchange->to_tensor(object, &tensor) != 0) return false;
  if (tensor.device_type == kDlCpu && (tensor.dims == 0 || tensor.strides != nullptr)) return true;
  PyErr_SetString(PyExc_ValueError, "Snapshot: tensors must be dense or strided, on the CPU");
  return false;
}

const char* address_of(const DlTensor& tensor) {
  return static_cast<const char*>(tensor.data) + tensor.byte_offset;
}

// Calls visit(value) for the address, the type, all sizes and strides.
template <typename Visit>
void visit_layout(const DlTensor& t, const Visit& visit) {
  visit(static_cast<int64_t>(reinterpret_cast<uintptr_t>(address_of(t))));
  visit(t.type_code << 16 | t.type_bits << 8 | t.dims);
  for (int32_t d = 0; d < t.dims; ++d) visit(t.sizes[d]), visit(t.strides[d]);
}

bool lies_as(const DlTensor& tensor, const std::vector<int64_t>& layout) {
  if (layout.size() != 2 + 2 * static_cast<size_t>(tensor.dims)) return false;
  const int64_t* expected = layout.data();
  bool same = true;
  visit_layout(tensor, [&](int64_t value) { same = *expected++ == value && same; });
  return same;
}

// What the facts beside it look at comes first: so long this loads.
inline __attribute__((always_inline)) void prefetch_samples(const Snapshot* snapshot) {
  constexpr size_t kLine = 64;
  for (const Watched& one : *snapshot->watched) __builtin_prefetch(one.tensor);
  for (const Run& run : *snapshot->runs) {
    for (size_t at = 0; at < run.bytes; at += kLine) __builtin_prefetch(run.address + at);
  }
}

bool snapshot_holds(const Snapshot* snapshot) {
  if (snapshot->owned == nullptr) return false;
  for (const Watched& one : *snapshot->watched) {
    DlTensor tensor;
    if (!read_layout(snapshot->exchange, one.tensor, tensor)) {
      PyErr_Clear();
      return false;
    }
    if (!lies_as(tensor, one.layout)) return false;
  }
  // They lie where the samples were taken, and live.
  const char* expected = snapshot->sample->data();
  for (const Run& run : *snapshot->runs) {
    if (std::memcmp(expected, run.address, run.bytes) != 0) return false;
    expected += run.bytes;
  }
  return true;
}

void take(Snapshot* snapshot, PyObject* object, const DlTensor& tensor) {
  Watched one{object, {}};
  visit_layout(tensor, [&](int64_t value) { one.layout.push_back(value); });
  snapshot->watched->push_back(std::move(one));
  const resnet_fused::Layout layout{address_of(tensor), tensor.type_bits / 8, tensor.dims,
                                    tensor.sizes, tensor.strides};
  resnet_fused::visit_samples(layout, [&](const char* address, int64_t bytes) {
    snapshot->runs->push_back({address, static_cast<size_t>(bytes)});
    snapshot->sample->insert(snapshot->sample->end(), address, address + bytes);
    return true;
  });
}

// Snapshot(exchange, tensors): as they are now.
PyObject* snapshot_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *capsule = nullptr, *tensors = nullptr;
  if (!PyArg_ParseTuple(args, "OO", &capsule, &tensors)) return nullptr;
  const auto* exchange =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  if (exchange->major != 1 || exchange->to_tensor == nullptr) {
    PyErr_SetString(PyExc_NotImplementedError, "Snapshot: torch does not tell how tensors lie");
    return nullptr;
  }
  Snapshot* snapshot = new_owner<Snapshot>(type, tensors);
  if (snapshot == nullptr) return nullptr;
  PyObject *self = reinterpret_cast<PyObject*>(snapshot), *owned = snapshot->owned;
  snapshot->exchange = exchange;
  snapshot->watched = new std::vector<Watched>;
  snapshot->runs = new std::vector<Run>;
  snapshot->sample = new std::vector<char>;
  for (Py_ssize_t i = 0; i < PyTuple_Size(owned); ++i) {
    DlTensor tensor;
    if (!read_layout(exchange, PyTuple_GetItem(owned, i), tensor)) {
      Py_DECREF(self);
      return nullptr;
    }
    take(snapshot, PyTuple_GetItem(owned, i), tensor);
  }
  return self;
}

PyObject* snapshot_call(PyObject* self, PyObject*, PyObject*) {
  return PyBool_FromLong(snapshot_holds(reinterpret_cast<Snapshot*>(self)));
}

int snapshot_traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<Snapshot*>(self)->owned);
  return 0;
}

int snapshot_clear(PyObject* self) {
  Py_CLEAR(reinterpret_cast<Snapshot*>(self)->owned);
  return 0;
}

void snapshot_dealloc(PyObject* self) {
  PyObject_GC_UnTrack(self);
  snapshot_clear(self);
  Snapshot* snapshot = reinterpret_cast<Snapshot*>(self);
  delete snapshot->watched;
  delete snapshot->runs;
  delete snapshot->sample;
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

}  // namespace
