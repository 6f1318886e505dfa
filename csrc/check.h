// Argument checks: one sentence that names the argument, what was expected and what came.
//
// STD_TORCH_CHECK appends file and line, which is noise to a Python user, so this throws plainly;
// across the stable ABI it arrives as a RuntimeError with the same sentence.
#pragma once

#include <cstdint>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace resnet_fused {

template <typename... Parts>
inline std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <typename... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  throw std::runtime_error(sentence(parts...));
}

template <typename... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

// Who refuses an argument: an op, or one of several convolutions that it was given.
struct OpName {
  const char* op;
  int64_t convolution = -1;

  OpName(const char* name) : op(name) {}
  OpName(const char* name, int64_t index) : op(name), convolution(index) {}
};

inline std::ostream& operator<<(std::ostream& text, const OpName& name) {
  text << name.op;
  return name.convolution < 0 ? text : text << ": convolution " << name.convolution;
}

// "(1, 64, 56, 56)", as Python prints a shape; works for any range of integers. Written only where
// a check fails: as text, shapes took 10 of the 25 us that conv_bn_act_cuda costs the host (on the
// null device of its tests). Holds a reference to the range.
template <typename Range>
struct ShapeText {
  const Range& range;
};

template <typename Range>
inline ShapeText<Range> shape_text(const Range& range) {
  return {range};
}

template <typename Range>
inline std::ostream& operator<<(std::ostream& text, const ShapeText<Range>& shape) {
  text << "(";
  int64_t count = 0;
  for (const auto value : shape.range) text << (count++ ? ", " : "") << value;
  return text << (count == 1 ? ",)" : ")");
}

}  // namespace resnet_fused
