// The arithmetic of the switch family, once for every device: fp32 (fp64 for fp64), each operation
// rounded on its own, one rounding to the weight's dtype, NaN stored as the canonical quiet NaN.
// Build with -ffp-contract=off (nvcc: -fmad=false): a contraction changes the bits.
#pragma once
#include <cstring>
#include <type_traits>

#include "hd.h"

namespace shira::core {

template <typename To, typename From>
SHIRA_HD To bits_to(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The float dtypes, held as their bits. `load` is exact, `store` rounds to nearest even.
struct Float16 {
  using Bits = uint16_t;
  using Compute = float;
  static SHIRA_HD float load(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t exponent = (h >> 10) & 0x1Fu, fraction = h & 0x3FFu;
    // No branch, so that loops vectorise. A subnormal is (2^-14 + fraction * 2^-24) - 2^-14, all of it exact;
    // infinities and NaN get exponent 255.
    const uint32_t rebased = exponent + (exponent == 31 ? 224u : exponent == 0 ? 113u : 112u);
    const float excess = bits_to<float>(exponent == 0 ? 0x38800000u : 0u);
    const float magnitude = bits_to<float>((rebased << 23) | (fraction << 13)) - excess;
    return bits_to<float>(sign | bits_to<uint32_t>(magnitude));
  }
  static SHIRA_HD uint16_t store(float x) {
    const uint32_t u = bits_to<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return 0x7E00u;                                 // NaN
    if (a >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // rounds past 65504
    if (a < 0x38800000u) {                                               // below 2^-14: subnormal
      // Adding 0.5 leaves fraction * 2^-24, rounded to nearest even by the addition itself.
      const uint32_t r = bits_to<uint32_t>(bits_to<float>(a) + 0.5f) - 0x3F000000u;
      return static_cast<uint16_t>(sign | r);
    }
    const uint32_t r = a + 0xFFFu + ((a >> 13) & 1u) - (112u << 23);
    return static_cast<uint16_t>(sign | (r >> 13));
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  using Compute = float;
  static SHIRA_HD float load(uint16_t h) { return bits_to<float>(static_cast<uint32_t>(h) << 16); }
  static SHIRA_HD uint16_t store(float x) {
    const uint32_t u = bits_to<uint32_t>(x);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;  // NaN
    return static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
  }
};

struct Float32 {
  using Bits = uint32_t;
  using Compute = float;
  static SHIRA_HD float load(uint32_t b) { return bits_to<float>(b); }
  static SHIRA_HD uint32_t store(float x) { return x != x ? 0x7FC00000u : bits_to<uint32_t>(x); }
};

struct Float64 {
  using Bits = uint64_t;
  using Compute = double;
  static SHIRA_HD double load(uint64_t b) { return bits_to<double>(b); }
  static SHIRA_HD uint64_t store(double x) { return x != x ? 0x7FF8000000000000ull : bits_to<uint64_t>(x); }
};

// A value of dtype V as an entry of a weight of dtype W: its own bits where the dtypes agree, rounded once where not.
template <typename W, typename V>
SHIRA_HD typename W::Bits convert(typename V::Bits value) {
  if constexpr (std::is_same_v<W, V>)
    return value;
  else
    return W::store(static_cast<typename W::Compute>(V::load(value)));
}

// weight = base + alpha*values (delta) or base + alpha*(values - base). Alpha 0 and the overwrite at
// alpha 1 are exact by definition, so they are moves. That is decided once per call, not for every entry.
enum class Rule { Keep, Overwrite, Blend, Delta };

SHIRA_HD Rule rule_of(double alpha, bool delta) {
  if (alpha == 0) return Rule::Keep;
  if (delta) return Rule::Delta;
  return alpha == 1 ? Rule::Overwrite : Rule::Blend;
}

template <typename W, typename V, Rule rule>
SHIRA_HD typename W::Bits mix(typename W::Bits base, typename V::Bits value, typename W::Compute alpha) {
  using C = typename W::Compute;
  if constexpr (rule == Rule::Keep) return base;
  if constexpr (rule == Rule::Overwrite) return convert<W, V>(value);
  const C b = W::load(base), v = static_cast<C>(V::load(value));
  if constexpr (rule == Rule::Delta)
    return W::store(b + alpha * v);
  else
    return W::store(b + alpha * (v - b));
}

}  // namespace shira::core
