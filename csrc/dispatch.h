// From dtypes that are known when the op is called to types that are known when it is compiled.
#pragma once
#include "checks.h"
#include "core/arithmetic.h"

namespace shira {

// f(Type<W>{}, Type<V>{}) for a weight of dtype W and values of dtype V.
template <typename T>
struct Type {
  using type = T;
};
template <typename F>
auto with_dtypes(ScalarType weight, ScalarType values, F&& f) {
  using namespace core;
  const bool fp32 = values == ScalarType::Float;
  switch (weight) {
    case ScalarType::Half: return fp32 ? f(Type<Float16>{}, Type<Float32>{}) : f(Type<Float16>{}, Type<Float16>{});
    case ScalarType::BFloat16:
      return fp32 ? f(Type<BFloat16>{}, Type<Float32>{}) : f(Type<BFloat16>{}, Type<BFloat16>{});
    case ScalarType::Float: return f(Type<Float32>{}, Type<Float32>{});
    default: return fp32 ? f(Type<Float64>{}, Type<Float32>{}) : f(Type<Float64>{}, Type<Float64>{});
  }
}
template <typename F>
auto with_index(ScalarType type, F&& f) {
  return type == ScalarType::Int ? f(Type<int32_t>{}) : f(Type<int64_t>{});
}

// f(std::integral_constant<Rule, rule>{}).
template <typename F>
auto with_rule(core::Rule rule, F&& f) {
  using core::Rule;
  switch (rule) {
    case Rule::Keep: return f(std::integral_constant<Rule, Rule::Keep>{});
    case Rule::Overwrite: return f(std::integral_constant<Rule, Rule::Overwrite>{});
    case Rule::Blend: return f(std::integral_constant<Rule, Rule::Blend>{});
    default: return f(std::integral_constant<Rule, Rule::Delta>{});
  }
}

}  // namespace shira
