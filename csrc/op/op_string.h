// String arguments of ops, received as handles: torch's own conversion to std::string (2.11 to
// 2.13) loses one string at every call.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <string>
#include <vector>

#include "check.h"

namespace resnet_fused {

inline std::string take_string(StringHandle handle) {
  const char* text = nullptr;
  size_t length = 0;
  const bool ok =
      torch_string_c_str(handle, &text) == 0 && torch_string_length(handle, &length) == 0;
  std::string result = ok ? std::string(text, length) : std::string();
  torch_delete_string(handle);
  return result;
}

inline std::vector<std::string> take_strings(const std::vector<StringHandle>& handles) {
  std::vector<std::string> strings;
  for (StringHandle handle : handles) strings.push_back(take_string(handle));
  return strings;
}

}  // namespace resnet_fused
