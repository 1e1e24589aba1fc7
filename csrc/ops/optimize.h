// The ops of the optimize family, once for every compiled backend: a single call is a list of one, everything is
// checked before the first write, and then the backend steps.
//
// A backend has static functions, all over lists of one length whose arguments are already checked:
//   content(op, name, indices, limit)   refuses indices that are not strictly increasing in [0, limit) granules,
//                                       where that needs no synchronisation
//   adamw (weights, indices, masters, exp_avgs, exp_avg_sqs, grads, options, granule)
//   sgd (weights, indices, masters, momentum_buffers, grads, options, granule): without buffers that list is empty
// A gradient for which `is_dense` holds has the weight's shape and is read at the indices; any other is [nnz].
#pragma once
#include <cmath>
#include <optional>

#include "../checks.h"
#include "../core/optimize.h"

namespace shira {

// If the weight's own shape is [nnz], the gradient counts as [nnz].
inline bool is_dense(const Tensor& grad, const Tensor& weight, int64_t nnz) {
  return !(grad.dim() == 1 && grad.numel() == nnz) && same_shape(grad, weight);
}

template <typename Backend>
struct OptimizeOps {
  static void adamw_list(Call call, const Tensors& weights, const Tensors& indices, const Tensors& masters,
                         const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& grads, const Tensor* step,
                         const Tensor* lr, core::AdamwOptions options) {
    call.length("indices", indices, weights);
    call.length("masters", masters, weights);
    call.length("exp_avgs", exp_avgs, weights);
    call.length("exp_avg_sqs", exp_avg_sqs, weights);
    call.length("grads", grads, weights);
    call.weights(weights, Kind::Arithmetic);
    for (size_t t = 0; t < weights.size(); ++t) {
      call.indices("indices", indices[t], weights[t], t);
      state(call, call.name("master", "masters", t), masters[t], weights[t], indices[t], t);
      state(call, call.name("exp_avg", "exp_avgs", t), exp_avgs[t], weights[t], indices[t], t);
      state(call, call.name("exp_avg_sq", "exp_avg_sqs", t), exp_avg_sqs[t], weights[t], indices[t], t);
      gradient(call, grads[t], weights[t], indices[t], t);
    }
    if (step != nullptr) {
      number(call, "step", *step, weights, ScalarType::Long, ScalarType::Float, options.step);
    } else {
      SHIRA_CHECK(options.step.given >= 1, call.op, ": step must be at least 1, got ", options.step.given);
    }
    rate(call, lr, weights, options.lr);
    decay(call, "beta1", options.beta1);
    decay(call, "beta2", options.beta2);
    finite(call, "eps", options.eps);
    SHIRA_CHECK(options.eps >= 0, call.op, ": eps must be at least 0, got ", options.eps);
    finite(call, "weight_decay", options.weight_decay);
    call.memory("weight", "weights", weights, true);
    call.memory("indices", indices, false);
    call.memory("master", "masters", masters, true);
    call.memory("exp_avg", "exp_avgs", exp_avgs, true);
    call.memory("exp_avg_sq", "exp_avg_sqs", exp_avg_sqs, true);
    call.memory("grad", "grads", grads, false);
    if (step != nullptr) call.overlap.add({"step"}, *step, false);
    if (lr != nullptr) call.overlap.add({"lr"}, *lr, false);
    call.overlap.check();
    content(call, indices, weights);
    Backend::adamw(weights, indices, masters, exp_avgs, exp_avg_sqs, grads, options, call.granule);
  }

  static void sgd_list(Call call, const Tensors& weights, const Tensors& indices, const Tensors& masters,
                       const std::optional<Tensors>& momentum_buffers, const Tensors& grads, const Tensor* lr,
                       core::SgdOptions options) {
    const bool given = momentum_buffers.has_value();
    const Tensors& buffers = given ? *momentum_buffers : Tensors();
    call.length("indices", indices, weights);
    call.length("masters", masters, weights);
    if (given) call.length("momentum_buffers", buffers, weights);
    call.length("grads", grads, weights);
    call.weights(weights, Kind::Arithmetic);
    for (size_t t = 0; t < weights.size(); ++t) {
      call.indices("indices", indices[t], weights[t], t);
      state(call, call.name("master", "masters", t), masters[t], weights[t], indices[t], t);
      if (given)
        state(call, call.name("momentum_buffer", "momentum_buffers", t), buffers[t], weights[t], indices[t], t);
      gradient(call, grads[t], weights[t], indices[t], t);
    }
    rate(call, lr, weights, options.lr);
    finite(call, "momentum", options.momentum);
    finite(call, "dampening", options.dampening);
    finite(call, "weight_decay", options.weight_decay);
    const char* name = call.list ? "momentum_buffers" : "momentum_buffer";
    if (options.momentum != 0)
      SHIRA_CHECK(given, call.op, ": ", name, " must be given for momentum ", printed(options.momentum), ", got None");
    else
      SHIRA_CHECK(!given, call.op, ": ", name, " must be None for momentum 0, got ", call.list ? "a list" : "one");
    SHIRA_CHECK(!options.nesterov || (options.momentum > 0 && options.dampening == 0), call.op,
                ": nesterov must come with momentum above 0 and dampening 0, got momentum ", printed(options.momentum),
                ", dampening ", printed(options.dampening));
    call.memory("weight", "weights", weights, true);
    call.memory("indices", indices, false);
    call.memory("master", "masters", masters, true);
    call.memory("momentum_buffer", "momentum_buffers", buffers, true);
    call.memory("grad", "grads", grads, false);
    if (lr != nullptr) call.overlap.add({"lr"}, *lr, false);
    call.overlap.check();
    content(call, indices, weights);
    Backend::sgd(weights, indices, masters, buffers, grads, options, call.granule);
  }

  // ---- what the checks of both share ----

  static void state(const Call& call, Name name, const Tensor& state, const Tensor& weight, const Tensor& indices,
                    int64_t t) {
    check_device(call.op, name, state, weight, call.weight_name(t));
    check_exact_dtype(call.op, name, state, compute_type(weight.scalar_type()));
    check_entries(call.op, name, state, indices, call.granule);
    check_contiguous(call.op, name, state);
  }

  static void gradient(const Call& call, const Tensor& grad, const Tensor& weight, const Tensor& indices, int64_t t) {
    const Name name = call.name("grad", "grads", t), owner = call.weight_name(t);
    check_device(call.op, name, grad, weight, owner);
    check_dtype(call.op, name, grad, Values::WeightOrFloat32, weight, owner);
    const int64_t nnz = indices.numel() * call.granule;
    SHIRA_CHECK((grad.dim() == 1 && grad.numel() == nnz) || same_shape(grad, weight), call.op, ": ", name,
                " must have ", nnz, " entries (", indices.numel(), " indices of granule ", call.granule, ") or ", owner,
                "'s shape ", list_text(weight.sizes()), ", got shape ", list_text(grad.sizes()));
    check_contiguous(call.op, name, grad);
  }

  // A number in a tensor, of dtype `own` or `other`, one of which is float32.
  template <typename T>
  static void number(const Call& call, const char* word, const Tensor& tensor, const Tensors& weights, ScalarType own,
                     ScalarType other, core::Number<T>& number) {
    if (weights.empty()) return;
    check_device(call.op, {word}, tensor, weights[0], call.weight_name(0));
    const ScalarType type = tensor.scalar_type();
    SHIRA_CHECK(type == own || type == other, call.op, ": ", word, " must be ", dtype_name(own), " or ",
                dtype_name(other), ", got ", dtype_name(type));
    SHIRA_CHECK(tensor.numel() == 1, call.op, ": ", word, " must have 1 entry, got shape ", list_text(tensor.sizes()));
    number.at = tensor.const_data_ptr();
    number.is_float = type == ScalarType::Float;
  }

  static void rate(const Call& call, const Tensor* lr, const Tensors& weights, core::Number<double>& rate) {
    if (lr != nullptr)
      number(call, "lr", *lr, weights, ScalarType::Float, ScalarType::Double, rate);
    else
      finite(call, "lr", rate.given);
  }

  static void finite(const Call& call, const char* word, double number) {
    SHIRA_CHECK(std::isfinite(number), call.op, ": ", word, " must be finite, got ", printed(number));
  }
  // How much of a running average a step keeps. At 1 the bias correction would divide by zero.
  static void decay(const Call& call, const char* word, double kept) {
    SHIRA_CHECK(kept >= 0 && kept < 1, call.op, ": ", word, " must be in [0, 1), got ", printed(kept));
  }

  // NaN without the sign that a stream would print.
  static double printed(double number) { return std::isnan(number) ? std::fabs(number) : number; }

  static void content(const Call& call, const Tensors& indices, const Tensors& weights) {
    for (size_t t = 0; t < weights.size(); ++t)
      Backend::content(call.op, call.name("indices", t), indices[t], weights[t].numel() / call.granule);
  }

  static std::optional<Tensors> list_of(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensors>({*tensor}) : std::nullopt;
  }

  // ---- as the schemas have them ----

  static void adamw_(const Tensor& weight, const Tensor& indices, const Tensor& master, const Tensor& exp_avg,
                     const Tensor& exp_avg_sq, const Tensor& grad, int64_t step, double lr, double beta1, double beta2,
                     double eps, double weight_decay, int64_t granule) {
    adamw_list({"adamw_", granule, false}, {weight}, {indices}, {master}, {exp_avg}, {exp_avg_sq}, {grad}, nullptr,
               nullptr, {{step}, {lr}, beta1, beta2, eps, weight_decay});
  }
  static void adamw_tensor_(const Tensor& weight, const Tensor& indices, const Tensor& master, const Tensor& exp_avg,
                            const Tensor& exp_avg_sq, const Tensor& grad, const Tensor& step, const Tensor& lr,
                            double beta1, double beta2, double eps, double weight_decay, int64_t granule) {
    adamw_list({"adamw_", granule, false}, {weight}, {indices}, {master}, {exp_avg}, {exp_avg_sq}, {grad}, &step, &lr,
               {{}, {}, beta1, beta2, eps, weight_decay});
  }
  static void sgd_(const Tensor& weight, const Tensor& indices, const Tensor& master,
                   const std::optional<Tensor>& momentum_buffer, const Tensor& grad, double lr, double momentum,
                   double dampening, double weight_decay, bool nesterov, int64_t granule) {
    sgd_list({"sgd_", granule, false}, {weight}, {indices}, {master}, list_of(momentum_buffer), {grad}, nullptr,
             {{lr}, momentum, dampening, weight_decay, nesterov});
  }
  static void sgd_tensor_(const Tensor& weight, const Tensor& indices, const Tensor& master,
                          const std::optional<Tensor>& momentum_buffer, const Tensor& grad, const Tensor& lr,
                          double momentum, double dampening, double weight_decay, bool nesterov, int64_t granule) {
    sgd_list({"sgd_", granule, false}, {weight}, {indices}, {master}, list_of(momentum_buffer), {grad}, &lr,
             {{}, momentum, dampening, weight_decay, nesterov});
  }

  static void foreach_adamw_(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                             const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& grads, int64_t step,
                             double lr, double beta1, double beta2, double eps, double weight_decay, int64_t granule) {
    adamw_list({"foreach_adamw_", granule, true}, weights, indices, masters, exp_avgs, exp_avg_sqs, grads, nullptr,
               nullptr, {{step}, {lr}, beta1, beta2, eps, weight_decay});
  }
  static void foreach_adamw_tensor_(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                                    const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& grads,
                                    const Tensor& step, const Tensor& lr, double beta1, double beta2, double eps,
                                    double weight_decay, int64_t granule) {
    adamw_list({"foreach_adamw_", granule, true}, weights, indices, masters, exp_avgs, exp_avg_sqs, grads, &step, &lr,
               {{}, {}, beta1, beta2, eps, weight_decay});
  }
  static void foreach_sgd_(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                           const std::optional<Tensors>& momentum_buffers, const Tensors& grads, double lr,
                           double momentum, double dampening, double weight_decay, bool nesterov, int64_t granule) {
    sgd_list({"foreach_sgd_", granule, true}, weights, indices, masters, momentum_buffers, grads, nullptr,
             {{lr}, momentum, dampening, weight_decay, nesterov});
  }
  static void foreach_sgd_tensor_(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                                  const std::optional<Tensors>& momentum_buffers, const Tensors& grads,
                                  const Tensor& lr, double momentum, double dampening, double weight_decay,
                                  bool nesterov, int64_t granule) {
    sgd_list({"foreach_sgd_", granule, true}, weights, indices, masters, momentum_buffers, grads, &lr,
             {{}, momentum, dampening, weight_decay, nesterov});
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("adamw_", TORCH_BOX(&adamw_));
    library.impl("adamw_.tensor", TORCH_BOX(&adamw_tensor_));
    library.impl("sgd_", TORCH_BOX(&sgd_));
    library.impl("sgd_.tensor", TORCH_BOX(&sgd_tensor_));
    library.impl("foreach_adamw_", TORCH_BOX(&foreach_adamw_));
    library.impl("foreach_adamw_.tensor", TORCH_BOX(&foreach_adamw_tensor_));
    library.impl("foreach_sgd_", TORCH_BOX(&foreach_sgd_));
    library.impl("foreach_sgd_.tensor", TORCH_BOX(&foreach_sgd_tensor_));
  }
};

}  // namespace shira
