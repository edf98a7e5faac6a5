// Rules for operators that compute more than they move: matrix products, convolutions, attention.
// PRIVATE to cost.cpp.
#pragma once

#include <string_view>
#include <unordered_map>

#include "emulator/aten/cost.hpp"

namespace spillover::emulator {

// By base name, "mm".
void add_math_rules(
    std::unordered_map<std::string_view, KernelCost (*)(const CostOperands&)>& rules);

// b products of m x k by k x n.
struct ProductShape {
  double b = 1;
  double m = 0;
  double n = 0;
  double k = 0;
};

// bytes: what is read and written once; the k split adds to it.
KernelCost product_cost(const ProductShape& shape, double bytes, double peak, double efficiency);

}  // namespace spillover::emulator
