#include "emulator/aten/operands.hpp"

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

// "argument self: Float [64, 64], bytes 0 to 256 of its storage", or "" for another tensor.
std::string describe_tensor(const std::string& name, const at::Tensor& tensor, const char* address,
                            size_t size_bytes) {
  if (!tensor.defined() || !tensor.has_storage()) return "";
  const auto* begin = static_cast<const char*>(tensor.storage().data());
  if (begin == nullptr || address < begin || address >= begin + tensor.storage().nbytes()) {
    return "";
  }
  const auto first = static_cast<size_t>(address - begin);
  return c10::str("argument ", name, ": ", tensor.scalar_type(), " ", tensor.sizes(), ", bytes ",
                  first, " to ", first + size_bytes, " of ", tensor.storage().nbytes());
}

}  // namespace

OperandScope::OperandScope(const OperatorPlan& plan, const c10::IValue* arguments, size_t count)
    : plan_(plan), arguments_(arguments), count_(std::min(count, plan.arguments.size())) {
  spillover_emulator_set_operand_describer(&describe, this);
}

OperandScope::~OperandScope() {
  spillover_emulator_set_operand_describer(nullptr, nullptr);
}

size_t OperandScope::describe(const void* address, size_t size_bytes, void* scope, char* out,
                              size_t capacity) {
  const auto& self = *static_cast<const OperandScope*>(scope);
  const auto* const place = static_cast<const char*>(address);
  std::string text;
  for (size_t i = 0; i < self.count_ && text.empty(); ++i) {
    const c10::IValue& value = self.arguments_[i];
    const std::string& name = self.plan_.arguments[i].name;
    if (value.isTensor()) {
      text = describe_tensor(name, value.toTensor(), place, size_bytes);
    } else if (self.plan_.arguments[i].kind == ArgumentKind::kTensorList && value.isList()) {
      size_t index = 0;
      for (const c10::IValue& element : value.toListRef()) {
        if (!text.empty()) break;
        if (element.isTensor()) {
          text = describe_tensor(c10::str(name, "[", index, "]"), element.toTensor(), place,
                                 size_bytes);
        }
        ++index;
      }
    }
  }
  if (text.empty()) text = "a result of the operator";
  if (capacity > 0) {
    const size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
  }
  return text.size();
}

}  // namespace spillover::emulator
