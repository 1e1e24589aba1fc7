// The steps of the optimize family, once for every device: fp32 (fp64 for fp64), each operation rounded on its own.
// What all entries share (bias corrections, 1 - beta, lr / bias) is computed in double and rounded once.
#pragma once
#include <cmath>

#include "arithmetic.h"

namespace shira::core {

// A number given with the call, or read from memory when the step runs: a captured graph follows that memory.
template <typename T>
struct Number {
  T given;
  const void* at = nullptr;  // a T or, if `is_float`, a float
  bool is_float = false;

  SHIRA_HD T get() const {
    if (at == nullptr) return given;
    if (!is_float) return *static_cast<const T*>(at);
    const float x = *static_cast<const float*>(at);
    if constexpr (std::is_floating_point_v<T>) {
      return x;
    } else {
      // Rounded towards zero. Outside int64 that is undefined: there it becomes the nearest int64, and NaN becomes 0.
      if (!(x > -9.2233720368547758e18f)) return x < 0 ? INT64_MIN : 0;
      return x < 9.2233720368547758e18f ? static_cast<T>(x) : INT64_MAX;
    }
  }
};

// base ^ exponent by repeated squaring: the same multiplications on every device.
SHIRA_HD double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

// Correctly rounded on every device: one instruction on x86, and nvcc's default.
SHIRA_HD float square_root(float x) { return ::sqrtf(x); }
SHIRA_HD double square_root(double x) { return ::sqrt(x); }

struct AdamwOptions {
  Number<int64_t> step;
  Number<double> lr;
  double beta1, beta2, eps, weight_decay;
};

// AdamW as torch.optim has it: p *= 1 - lr*decay; m += (g - m)*(1 - beta1); v = v*beta2 + g*g*(1 - beta2);
// p -= lr/(1 - beta1^step) * m / (sqrt(v)/sqrt(1 - beta2^step) + eps).
template <typename C>
struct Adamw {
  C decay, rest1, beta2, rest2, root, eps, step_size;

  SHIRA_HD explicit Adamw(const AdamwOptions& o) {
    const int64_t step = o.step.get();
    const double lr = o.lr.get();
    decay = static_cast<C>(1 - lr * o.weight_decay);
    rest1 = static_cast<C>(1 - o.beta1);
    beta2 = static_cast<C>(o.beta2);
    rest2 = static_cast<C>(1 - o.beta2);
    root = static_cast<C>(square_root(1 - power(o.beta2, step)));
    eps = static_cast<C>(o.eps);
    step_size = static_cast<C>(lr / (1 - power(o.beta1, step)));
  }
  SHIRA_HD void operator()(C& p, C& m, C& v, C g) const {
    m = m + (g - m) * rest1;
    v = v * beta2 + (g * g) * rest2;
    p = p * decay - step_size * (m / (square_root(v) / root + eps));
  }
};

struct SgdOptions {
  Number<double> lr;
  double momentum, dampening, weight_decay;
  bool nesterov;
};

// SGD as torch.optim has it: g += decay*p; buffer = momentum*buffer + (1 - dampening)*g; p -= lr * (buffer, or
// g + momentum*buffer for nesterov, or g without a buffer). Without decay nothing is added: 0*p is not always 0.
template <typename C>
struct Sgd {
  C lr, momentum, rest, decay;
  bool decays, nesterov;

  SHIRA_HD explicit Sgd(const SgdOptions& o)
      : lr(static_cast<C>(o.lr.get())),
        momentum(static_cast<C>(o.momentum)),
        rest(static_cast<C>(1 - o.dampening)),
        decay(static_cast<C>(o.weight_decay)),
        decays(o.weight_decay != 0),
        nesterov(o.nesterov) {}
  SHIRA_HD void operator()(C& p, C g) const { p = p - lr * decayed(p, g); }
  SHIRA_HD void operator()(C& p, C& buffer, C g) const {
    g = decayed(p, g);
    buffer = momentum * buffer + rest * g;
    p = p - lr * (nesterov ? g + momentum * buffer : buffer);
  }

 private:
  SHIRA_HD C decayed(C p, C g) const { return decays ? g + decay * p : g; }
};

// The dtype of the optimizer state for a weight of dtype W.
template <typename W>
using StateOf = std::conditional_t<std::is_same_v<W, Float64>, Float64, Float32>;

}  // namespace shira::core
