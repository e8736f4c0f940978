// The part of the DLPack ABI that we read, restated (https://dmlc.github.io/dlpack/latest).
#pragma once

#include <cstdint>
#include <initializer_list>

#include <pybind11/pybind11.h>

#include "kvpo/error.h"

namespace kvpo::dlpack {

struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides; // in elements; null means contiguous
  uint64_t byte_offset;
};

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4;

// A borrowed, checked view: the capsule stays owned by Python for the length of the call.
class View {
public:
  View(const pybind11::capsule& capsule, const char* name) : name_(name) {
    KVPO_CHECK(std::string(capsule.name()) == "dltensor", label() + " is not a DLPack capsule");
    t_ = capsule.get_pointer<Tensor>();
  }

  void* data() const { return static_cast<char*>(t_->data) + t_->byte_offset; }
  template <typename T> T* data(uint8_t code) const {
    KVPO_CHECK(is(code, sizeof(T) * 8), label() + " has the wrong dtype");
    return static_cast<T*>(data());
  }
  bool is(uint8_t code, size_t bits) const {
    return t_->dtype.code == code && t_->dtype.bits == bits && t_->dtype.lanes == 1;
  }
  int rank() const { return t_->ndim; }
  int64_t size(int i) const { return t_->shape[i]; }
  // In elements.
  int64_t stride(int i) const {
    if (t_->strides)
      return t_->strides[i];
    int64_t product = 1;
    for (int j = t_->ndim - 1; j > i; --j)
      product *= t_->shape[j];
    return product;
  }
  int32_t device() const { return t_->device.type; }

  bool empty() const {
    for (int i = 0; i < t_->ndim; ++i)
      if (t_->shape[i] == 0)
        return true;
    return false;
  }
  const View& contiguous() const {
    if (empty())
      return *this; // no element, no stride
    int64_t want = 1;
    for (int i = t_->ndim - 1; i >= 0; --i) {
      KVPO_CHECK(t_->shape[i] <= 1 || stride(i) == want, label() + " must be contiguous");
      want *= t_->shape[i];
    }
    return *this;
  }
  const View& expect(std::initializer_list<int64_t> shape) const {
    KVPO_CHECK(t_->ndim == static_cast<int32_t>(shape.size()), label() + " has the wrong rank");
    int i = 0;
    for (int64_t n : shape)
      KVPO_CHECK(t_->shape[i++] == n, label() + " has the wrong shape");
    return *this;
  }

private:
  std::string label() const { return std::string("`") + name_ + "`"; }
  const Tensor* t_;
  const char* name_;
};

} // namespace kvpo::dlpack
