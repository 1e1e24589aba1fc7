// The contract: every op of torch.ops.shira, one line each, grouped by family.
// Nothing else declares an op. Fakes (shira_ops/fake.py) and references (shira_ops/reference.py)
// are in the same order; the words used here are defined in docs/concepts.md.
#pragma once

// clang-format off
#define SHIRA_SCHEMAS(m)                                                                                              \
  /* switch: moves of bits, and the arithmetic of strengths */                                                        \
  m.def("gather(Tensor weight, Tensor indices, int granule=1) -> Tensor");                                            \
  m.def("scatter_(Tensor(a!) weight, Tensor indices, Tensor values, int granule=1) -> ()");                           \
  m.def("swap_(Tensor(a!) weight, Tensor indices, Tensor(b!) values, int granule=1) -> ()");                          \
  m.def("apply_(Tensor(a!) weight, Tensor indices, Tensor values, Tensor(b!) saved, *, float alpha=1.0, "             \
        "bool delta=False, int granule=1) -> ()");                                                                    \
  m.def("switch_(Tensor(a!) weight, Tensor indices_out, Tensor saved_out, Tensor indices_in, Tensor values, "         \
        "Tensor(b!) saved_in, *, float alpha=1.0, bool delta=False, int granule=1) -> ()");                           \
  m.def("scatter_add_(Tensor(a!) weight, Tensor indices, Tensor values, *, float alpha=1.0, int granule=1) -> ()");   \
  m.def("foreach_gather(Tensor[] weights, Tensor[] indices, int granule=1) -> Tensor[]");                             \
  m.def("foreach_scatter_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, int granule=1) -> ()");            \
  m.def("foreach_swap_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] values, int granule=1) -> ()");           \
  m.def("foreach_apply_(Tensor(a!)[] weights, Tensor[] indices, Tensor[] values, Tensor(b!)[] saved, *, "             \
        "float alpha=1.0, bool delta=False, int granule=1) -> ()");                                                   \
  m.def("foreach_switch_(Tensor(a!)[] weights, Tensor[] indices_out, Tensor[] saved_out, Tensor[] indices_in, "       \
        "Tensor[] values, Tensor(b!)[] saved_in, *, float alpha=1.0, bool delta=False, int granule=1) -> ()");        \
  m.def("check_indices(Tensor indices, int limit, int granule=1) -> ()");                                             \
  /* fuse: several adapters at once */                                                                                \
  m.def("fuse_plan(Tensor[] indices, int granule=1) -> (Tensor indices, Tensor offsets, Tensor sources, "               \
        "Tensor members)");                                                                                           \
  m.def("fuse_(Tensor(a!) weight, Tensor(b!) saved, Tensor indices, Tensor offsets, Tensor sources, "                 \
        "Tensor members, Tensor[] values, Tensor alphas, *, bool[] delta, bool refuse=False, int granule=1) -> ()");  \
  /* gradient */                                                                                                      \
  m.def("sampled_grad(Tensor grad_output, Tensor input, Tensor indices, int granule=1) -> Tensor");                   \
  /* optimize: masked-gradient steps */                                                                               \
  m.def("adamw_(Tensor(a!) weight, Tensor indices, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "    \
        "Tensor grad, *, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "               \
        "int granule=1) -> ()");                                                                                      \
  m.def("adamw_.tensor(Tensor(a!) weight, Tensor indices, Tensor(b!) master, Tensor(c!) exp_avg, "                    \
        "Tensor(d!) exp_avg_sq, Tensor grad, *, Tensor step, Tensor lr, float beta1, float beta2, float eps, "        \
        "float weight_decay, int granule=1) -> ()");                                                                  \
  m.def("sgd_(Tensor(a!) weight, Tensor indices, Tensor(b!) master, Tensor(c!)? momentum_buffer, Tensor grad, *, "    \
        "float lr, float momentum, float dampening, float weight_decay, bool nesterov, int granule=1) -> ()");        \
  m.def("sgd_.tensor(Tensor(a!) weight, Tensor indices, Tensor(b!) master, Tensor(c!)? momentum_buffer, "             \
        "Tensor grad, *, Tensor lr, float momentum, float dampening, float weight_decay, bool nesterov, "             \
        "int granule=1) -> ()");                                                                                      \
  m.def("foreach_adamw_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs, "        \
        "Tensor(d!)[] exp_avg_sqs, Tensor[] grads, *, int step, float lr, float beta1, float beta2, float eps, "      \
        "float weight_decay, int granule=1) -> ()");                                                                  \
  m.def("foreach_adamw_.tensor(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] masters, "                        \
        "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor[] grads, *, Tensor step, Tensor lr, float beta1, "   \
        "float beta2, float eps, float weight_decay, int granule=1) -> ()");                                          \
  m.def("foreach_sgd_(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] masters, "                                 \
        "Tensor(c!)[]? momentum_buffers, Tensor[] grads, *, float lr, float momentum, float dampening, "              \
        "float weight_decay, bool nesterov, int granule=1) -> ()");                                                   \
  m.def("foreach_sgd_.tensor(Tensor(a!)[] weights, Tensor[] indices, Tensor(b!)[] masters, "                          \
        "Tensor(c!)[]? momentum_buffers, Tensor[] grads, *, Tensor lr, float momentum, float dampening, "             \
        "float weight_decay, bool nesterov, int granule=1) -> ()");                                                   \
  /* select: masks */                                                                                                 \
  m.def("select_top(Tensor weight, Tensor? grad, int k, *, str score, int granule=1) -> Tensor");                     \
  m.def("select_random(int numel, int k, int seed, *, Device? device=None, int granule=1) -> Tensor");                \
  /* codec: indices as bytes */                                                                                       \
  m.def("encode_indices(Tensor indices, int granule=1, *, int version=1) -> Tensor");                                 \
  m.def("decode_indices(Tensor code, int count, int limit, ScalarType dtype, int granule=1) -> Tensor");              \
  /* fingerprint */                                                                                                   \
  m.def("fingerprint(Tensor weight, int granule=1) -> Tensor");                                                       \
  m.def("fingerprint_at(Tensor weight, Tensor indices, int granule=1) -> Tensor");                                    \
  m.def("fingerprint_part(Tensor weight, int first, int run, int stride, int granule=1) -> Tensor");                  \
  /* diff: what changed since a snapshot */                                                                           \
  m.def("diff_(Tensor(a!) snapshot, Tensor weight, int granule=1, *, bool before=False) -> "                           \
        "(Tensor indices, Tensor values)");                                                                           \
  m.def("foreach_diff_(Tensor(a!)[] snapshots, Tensor[] weights, int granule=1, *, bool before=False) -> "            \
        "(Tensor[] indices, Tensor[] values)");                                                                       \
  /* overlay: sparse deltas beside a weight that is never written */                                                  \
  m.def("sparse_linear(Tensor input, Tensor indices, Tensor values, int out_features, *, bool transposed=False, "     \
        "int granule=1) -> Tensor");                                                                                  \
  m.def("sparse_linear_add_(Tensor(a!) output, Tensor input, Tensor[] indices, Tensor[] values, Tensor adapters, "    \
        "Tensor alphas, int granule=1, *, bool transposed=False) -> ()")
// clang-format on
