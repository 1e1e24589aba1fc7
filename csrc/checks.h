// What an op refuses, and the sentences it says: op, argument, requirement, what was given.
// Every compiled backend calls these before it writes. shira_ops/checks.py says the same in Python, for fakes,
// references and Triton, and tests/ops/test_refusals.py holds the two to one text.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "stable.h"

namespace shira {

// What SHIRA_BACKEND asks for. shira_ops/_choice.py has refused any unknown word before this module is loaded.
inline std::string_view wanted_backend() {
  const char* wanted = std::getenv("SHIRA_BACKEND");
  return wanted != nullptr ? wanted : "";
}

// SHIRA_BACKEND=reference: no compiled kernel registers, and the plain-torch references serve.
inline bool backend_is_reference() { return wanted_backend() == "reference"; }

// Whether another backend serves CUDA. The emulated build, which runs the CUDA sources on CPU tensors, always serves.
inline bool backend_skips_cuda() {
#if defined(SHIRA_EMULATE)
  return false;
#else
  return backend_is_reference() || wanted_backend() == "triton";
#endif
}

template <typename... Args>
[[noreturn]] inline void refuse(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  throw std::runtime_error(text.str());
}

// A refusal's sentence is built only when it is needed: the arguments are not evaluated otherwise.
#define SHIRA_CHECK(condition, ...)                 \
  do {                                              \
    if (!(condition)) ::shira::refuse(__VA_ARGS__); \
  } while (0)

// The name of an argument: `values`, or `values[3]` within a list.
struct Name {
  const char* word;
  int64_t member = -1;
};
inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.word;
  if (name.member >= 0) out << '[' << name.member << ']';
  return out;
}

// dtypes as Python prints them.
inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: {
      std::string name = torch::headeronly::toString(type);  // Bool, BFloat16, Float8_e4m3fn, UInt16: lower case
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return name;
    }
  }
}

template <typename Sizes>
inline std::string list_text(const Sizes& sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

inline std::string device_name(const Tensor& t) {
  const auto device = t.device();
  const char* type = "another kind";
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu";
    case torch::headeronly::DeviceType::CUDA: type = "cuda"; break;
    case torch::headeronly::DeviceType::Meta: type = "meta"; break;
    default: break;
  }
  return device.has_index() ? std::string(type) + ":" + std::to_string(device.index()) : type;
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float ||
         type == ScalarType::Double;
}
inline ScalarType compute_type(ScalarType weight) {
  return weight == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline bool same_shape(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

// The dispatcher lets None pass for a tensor.
inline void check_given(const char* op, Name name, const Tensor& t) {
  SHIRA_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None");
}

inline void check_contiguous(const char* op, Name name, const Tensor& t) {
  check_given(op, name, t);
  SHIRA_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", list_text(t.sizes()),
              " with strides ", list_text(t.strides()));
}

inline void check_granule(const char* op, int64_t granule) {
  SHIRA_CHECK(granule >= 1, op, ": granule must be at least 1, got ", granule);
}

// A granule is at most as long as the whole, of `numel` entries; `whole` is how a refusal names it ("weight's 6
// entries").
template <typename... Whole>
inline void check_granule_fits(const char* op, int64_t granule, int64_t numel, const Whole&... whole) {
  const int64_t most = std::max<int64_t>(numel, 1);
  SHIRA_CHECK(granule <= most, op, ": granule must be at most ", most, " for ", whole..., ", got ", granule);
}

inline void check_limit(const char* op, int64_t limit, int64_t granule) {
  SHIRA_CHECK(limit >= 0 && limit % granule == 0, op, ": limit must be a multiple of granule ", granule,
              " and not negative, got ", limit);
  check_granule_fits(op, granule, limit, "limit ", limit);
}

inline void check_list_length(const char* op, const char* name, const std::vector<Tensor>& list, size_t weights) {
  SHIRA_CHECK(list.size() == weights, op, ": ", name, " must have one tensor for each of the ", weights,
              " weights, got ", list.size());
}

enum class Kind { Moves, Arithmetic };

inline void check_weight(const char* op, const Tensor& weight, int64_t granule, Kind kind, Name name = {"weight"}) {
  check_contiguous(op, name, weight);
  if (kind == Kind::Arithmetic) {
    SHIRA_CHECK(is_float(weight.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
                dtype_name(weight.scalar_type()));
  } else {
    const size_t bytes = weight.element_size();
    SHIRA_CHECK(bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8, op, ": ", name,
                " must have entries of 1, 2, 4 or 8 bytes, got ", dtype_name(weight.scalar_type()));
  }
  check_granule_fits(op, granule, weight.numel(), name, "'s ", weight.numel(), " entries");
  SHIRA_CHECK(weight.numel() % granule == 0, op, ": granule must divide ", name, "'s ", weight.numel(),
              " entries, got ", granule);
}

inline void check_device(const char* op, Name name, const Tensor& t, const Tensor& weight, Name weight_name) {
  check_given(op, name, t);
  SHIRA_CHECK(t.device() == weight.device(), op, ": ", name, " must be on ", weight_name, "'s device ",
              device_name(weight), ", got ", device_name(t));
}

inline void check_indices(const char* op, Name name, const Tensor& indices) {
  const ScalarType type = indices.scalar_type();
  SHIRA_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": ", name, " must be int32 or int64, got ",
              dtype_name(type));
  SHIRA_CHECK(indices.dim() == 1, op, ": ", name, " must be 1-D, got shape ", list_text(indices.sizes()));
  check_contiguous(op, name, indices);
}

// Which dtypes `values` may have beside the weight's own.
enum class Values { Weight, WeightOrFloat32 };

inline void check_dtype(const char* op, Name name, const Tensor& values, Values dtypes, const Tensor& weight,
                        Name weight_name) {
  const ScalarType own = weight.scalar_type(), given = values.scalar_type();
  const bool fp32_too = dtypes == Values::WeightOrFloat32 && is_float(own) && own != ScalarType::Float;
  SHIRA_CHECK(given == own || (fp32_too && given == ScalarType::Float), op, ": ", name, " must have ", weight_name,
              "'s dtype ", dtype_name(own), fp32_too ? " or float32" : "", ", got ", dtype_name(given));
}

inline void check_exact_dtype(const char* op, Name name, const Tensor& t, ScalarType wanted) {
  SHIRA_CHECK(t.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted), ", got ",
              dtype_name(t.scalar_type()));
}

inline void check_one_dimensional(const char* op, Name name, const Tensor& t) {
  SHIRA_CHECK(t.dim() == 1, op, ": ", name, " must be 1-D, got shape ", list_text(t.sizes()));
}

// A tensor with one entry for each that `indices` selects.
inline void check_entries(const char* op, Name name, const Tensor& t, const Tensor& indices, int64_t granule) {
  check_one_dimensional(op, name, t);
  SHIRA_CHECK(t.numel() == indices.numel() * granule, op, ": ", name, " must have ", indices.numel() * granule,
              " entries (", indices.numel(), " indices of granule ", granule, "), got ", t.numel());
}

inline void check_values(const char* op, Name name, const Tensor& values, Values dtypes, const Tensor& weight,
                         Name weight_name, const Tensor& indices, int64_t granule) {
  check_device(op, name, values, weight, weight_name);
  check_dtype(op, name, values, dtypes, weight, weight_name);
  check_entries(op, name, values, indices, granule);
  check_contiguous(op, name, values);
}

// ---- activations: [..., features] ------------------------------------------------------------------------

inline int64_t last_size(const Tensor& t) { return t.size(t.dim() - 1); }

// Both must have the same tokens; returns how many.
inline int64_t check_leads(const char* op, Name name, const Tensor& t, const Tensor& other) {
  const auto sizes = other.sizes();
  const std::vector<int64_t> lead(sizes.begin(), sizes.end() - 1);
  SHIRA_CHECK(t.dim() == other.dim() && std::equal(lead.begin(), lead.end(), t.sizes().begin()), op, ": ", name,
              " must have shape ", list_text(lead), " before its last dimension, got shape ", list_text(t.sizes()));
  int64_t tokens = 1;
  for (const int64_t size : lead) tokens *= size;
  return tokens;
}

inline void check_activations(const char* op, Name name, const Tensor& t) {
  check_given(op, name, t);
  SHIRA_CHECK(is_float(t.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
              dtype_name(t.scalar_type()));
  SHIRA_CHECK(t.dim() >= 1, op, ": ", name, " must have at least one dimension, got shape ", list_text(t.sizes()));
  check_contiguous(op, name, t);
}

// The number of entries in the weight of a linear layer, for ops that are given only input and output. Without tokens
// those are empty, however many entries it has.
inline int64_t check_matrix(const char* op, int64_t rows, int64_t columns, int64_t granule) {
  int64_t entries;
  SHIRA_CHECK(!__builtin_mul_overflow(rows, columns, &entries), op,
              ": weight must have fewer than 2^63 entries, got shape ", list_text(std::vector{rows, columns}));
  check_granule_fits(op, granule, entries, "weight's ", entries, " entries");
  SHIRA_CHECK(entries % granule == 0, op, ": granule must divide weight's ", entries, " entries, got ", granule);
  return entries;
}

// A tensor whose storage was freed or shrunk (as sharding does between uses) still has its shape, and a tensor made for
// tracing has nothing else. Memory that other libraries lay out (numpy, a mapped file) may start between two entries.
// Checked after the shapes and before the first access. Returns where the entries start.
inline const char* check_memory(const char* op, Name name, const Tensor& t) {
  if (t.numel() == 0) return nullptr;
  const int64_t end = (t.storage_offset() + t.numel()) * static_cast<int64_t>(t.element_size());
  int64_t held = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  SHIRA_CHECK(end <= held, op, ": ", name, " must lie within its storage, up to byte ", end, ", got a storage of ",
              held, " bytes");
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  SHIRA_CHECK(begin != nullptr, op, ": ", name, " must have memory, got a tensor without any (a FakeTensor?)");
  const size_t past = reinterpret_cast<uintptr_t>(begin) % t.element_size();
  SHIRA_CHECK(past == 0, op, ": ", name, " must start at a multiple of its entries' ", t.element_size(), " bytes, got ",
              past, " more (its clone() is aligned)");
  return begin;
}

// The memory of the arguments of one call: it must be there, and a mutated argument must not overlap any other.
class Overlap {
 public:
  explicit Overlap(const char* op) : op_(op) {}

  // Arguments are added in the order of the schema.
  void add(Name name, const Tensor& t, bool mutated) {
    const char* begin = check_memory(op_, name, t);
    if (begin == nullptr) return;
    const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
    ranges_.push_back({begin, begin + bytes, name, mutated, ranges_.size()});
  }

  void check() {
    // In the order of addresses, a clash is always with the range that reaches furthest. Mutated and read-only ranges
    // are kept apart, since read-only ones may coincide (a mask that several weights share).
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range *open = nullptr, *open_mutated = nullptr;
    for (const Range& r : ranges_) {
      if (r.mutated && open != nullptr && r.begin < open->end) clash(r, *open);
      if (open_mutated != nullptr && r.begin < open_mutated->end) clash(r, *open_mutated);
      if (open == nullptr || r.end > open->end) open = &r;
      if (r.mutated && (open_mutated == nullptr || r.end > open_mutated->end)) open_mutated = &r;
    }
  }

 private:
  struct Range {
    const char *begin, *end;
    Name name;
    bool mutated;
    size_t order;
  };
  [[noreturn]] void clash(const Range& a, const Range& b) const {
    const Range &later = a.order > b.order ? a : b, &earlier = a.order > b.order ? b : a;
    refuse(op_, ": ", later.name, " must not overlap ", earlier.name, " in memory");
  }
  const char* op_;
  std::vector<Range> ranges_;
};

// The limit of indices that have no weight: they must only be increasing and not negative.
constexpr int64_t kNoLimit = -1;

// Entry `position` of `indices` is out of range, or not above the one before it.
template <typename I>
[[noreturn]] inline void refuse_entry(const char* op, Name name, I entry, I before, int64_t position, int64_t limit) {
  const std::string span = limit == kNoLimit ? "and at least 0" : "in [0, " + std::to_string(limit) + ")";
  if (entry < 0 || (limit != kNoLimit && entry >= limit))
    refuse(op, ": ", name, " must be strictly increasing ", span, ", got ", entry, " at position ", position);
  refuse(op, ": ", name, " must be strictly increasing ", span, ", got ", entry, " after ", before, " at position ",
         position);
}

// The first position of `indices` that is refused.
template <typename I>
[[noreturn]] inline void refuse_content(const char* op, Name name, const I* p, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    if (p[i] < 0 || (limit != kNoLimit && p[i] >= limit) || (i > 0 && p[i] <= p[i - 1]))
      refuse_entry(op, name, p[i], i > 0 ? p[i - 1] : I{0}, i, limit);
  refuse(op, ": ", name, " changed while they were checked");
}

using Tensors = std::vector<Tensor>;

// One call over a weight, or over lists: the names of its arguments, and the checks that name them.
struct Call {
  const char* op;
  int64_t granule;
  bool list;
  Overlap overlap;

  Call(const char* op, int64_t granule, bool list) : op(op), granule(granule), list(list), overlap(op) {
    check_granule(op, granule);
  }
  Name name(const char* single, const char* plural, int64_t member) const {
    return list ? Name{plural, member} : Name{single};
  }
  Name name(const char* word, int64_t member) const { return name(word, word, member); }
  Name weight_name(int64_t member) const { return name("weight", "weights", member); }

  void length(const char* word, const Tensors& tensors, const Tensors& weights) const {
    check_list_length(op, word, tensors, weights.size());
  }
  void weights(const Tensors& weights, Kind kind) const {
    for (size_t t = 0; t < weights.size(); ++t) {
      check_weight(op, weights[t], granule, kind, weight_name(t));
      SHIRA_CHECK(weights[t].device() == weights[0].device(), op, ": weights[", t,
                  "] must be on the device of weights[0] ", device_name(weights[0]), ", got ", device_name(weights[t]));
    }
  }
  void indices(const char* word, const Tensor& indices, const Tensor& weight, int64_t member) const {
    check_device(op, name(word, member), indices, weight, weight_name(member));
    check_indices(op, name(word, member), indices);
  }
  void values(const char* word, const Tensor& values, Values dtypes, const Tensor& weight, const Tensor& indices,
              int64_t member) const {
    check_values(op, name(word, member), values, dtypes, weight, weight_name(member), indices, granule);
  }
  void alpha(const Tensor& weight, double alpha, bool delta) const {
    SHIRA_CHECK(is_float(weight.scalar_type()) || (alpha == 1 && !delta), op,
                ": alpha must be 1 and delta False for weights of dtype ", dtype_name(weight.scalar_type()),
                ", got alpha ", alpha, ", delta ", delta ? "True" : "False");
  }
  void memory(const char* single, const char* plural, const Tensors& tensors, bool mutated) {
    for (size_t t = 0; t < tensors.size(); ++t) overlap.add(name(single, plural, t), tensors[t], mutated);
  }
  void memory(const char* word, const Tensors& tensors, bool mutated) { memory(word, word, tensors, mutated); }
};

}  // namespace shira
