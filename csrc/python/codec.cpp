// shira._codec: the index code and the fingerprint on numpy arrays and buffers, so that an adapter's file can be
// read and checked without importing torch. One thread, without the GIL; the same bits and the same refusals as
// the ops, as ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <vector>

#include "../core/codec.h"
#include "../core/difference.h"
#include "../core/fingerprint.h"
#include "../core/numbers.h"

namespace py = pybind11;
namespace core = shira::core;
namespace codec = shira::core::codec;
namespace numbers = shira::core::numbers;

namespace {

template <typename... Args>
[[noreturn]] void refuse(const Args&... args) {
  std::ostringstream text;
  ((text << args), ...);
  throw py::value_error(text.str());
}

std::string text_of(const py::handle& object) { return py::str(object).cast<std::string>(); }

// The widths this processor has, narrowest first. Everything takes the last one; the tests take each.
core::Width width_of(const std::string& name) {
  core::Width width = core::widest();
  if (!name.empty() && !core::find_width(name, width)) refuse("width must be one of widths(), got ", name);
  return width;
}

py::tuple widths() {
  switch (core::widest()) {
    case core::Width::Avx512: return py::make_tuple("portable", "avx2", "avx512");
    case core::Width::Avx2: return py::make_tuple("portable", "avx2");
    case core::Width::Portable: break;
  }
  return py::make_tuple("portable");
}

// The bytes of anything with a buffer, of any type and alignment, without a copy.
struct Bytes {
  py::buffer_info info;
  const uint8_t* data;
  int64_t size;

  Bytes(const char* op, const char* name, const py::buffer& buffer) : info(buffer.request()) {
    py::ssize_t dense = info.itemsize;
    bool contiguous = true;
    for (py::ssize_t d = info.ndim - 1; d >= 0; --d) {
      contiguous = contiguous && (info.shape[d] == 1 || info.strides[d] == dense);
      dense *= info.shape[d];
    }
    if (!contiguous && info.size > 0) refuse(op, ": ", name, " must be contiguous");
    data = static_cast<const uint8_t*>(info.ptr);
    size = static_cast<int64_t>(info.size) * static_cast<int64_t>(info.itemsize);
  }
};

template <typename Index>
py::array_t<uint8_t> encode_as(const py::array& indices, int64_t version, core::Width width) {
  const auto* data = static_cast<const Index*>(indices.data());
  const int64_t count = indices.size();
  codec::Encoder<Index> encoder(data, count, version, width);
  int64_t bytes = 0;
  std::string refusal;
  {
    py::gil_scoped_release release;
    bool good = true;
    for (int64_t chunk = 0; good && chunk < encoder.chunks(); ++chunk) good = encoder.encode(chunk);
    if (good)
      bytes = encoder.place();
    else
      refusal = codec::explain_indices(data, count);
  }
  if (!refusal.empty()) refuse(refusal);
  py::array_t<uint8_t> code(bytes);
  uint8_t* out = code.mutable_data();
  py::gil_scoped_release release;
  for (int64_t chunk = 0; chunk < encoder.chunks(); ++chunk) encoder.write(chunk, out);
  return code;
}

py::array_t<uint8_t> encode(const py::array& indices, int64_t version, const std::string& width_name) {
  const core::Width width = width_of(width_name);
  if (version != 1 && version != 2) refuse("encode_indices: version must be 1 or 2, got ", version);
  const py::dtype dtype = indices.dtype();
  const bool narrow = dtype.equal(py::dtype::of<int32_t>());
  if (!narrow && !dtype.equal(py::dtype::of<int64_t>()))
    refuse("encode_indices: indices must be int32 or int64, got ", text_of(dtype));
  if (indices.ndim() != 1)
    refuse("encode_indices: indices must be 1-D, got shape ", text_of(py::list(indices.attr("shape"))));
  if (indices.size() > 1 && indices.strides(0) != indices.itemsize())
    refuse("encode_indices: indices must be contiguous, got shape [", indices.size(), "] with strides [",
           indices.strides(0) / indices.itemsize(), "]");
  if ((indices.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
    refuse("encode_indices: indices must be aligned to their ", indices.itemsize(), " bytes");
  return narrow ? encode_as<int32_t>(indices, version, width) : encode_as<int64_t>(indices, version, width);
}

template <typename Index>
py::array decode_as(const Bytes& bytes, int64_t count, int64_t granules, core::Width width) {
  const codec::Code code{bytes.data, bytes.size, count, granules, std::numeric_limits<Index>::max()};
  if (!codec::holds(code)) refuse(codec::explain_size(code));
  py::array_t<Index> indices(count);
  Index* out = indices.mutable_data();
  std::string refusal;
  {
    py::gil_scoped_release release;
    for (int64_t block = 0; block < code.blocks(); ++block) {
      if (codec::decode_block(code, block, out + block * codec::kBlock, width)) continue;
      refusal = codec::explain_block(code, block);
      break;
    }
  }
  if (!refusal.empty()) refuse(refusal);
  return indices;
}

py::array decode(const py::buffer& code, int64_t count, int64_t limit, const py::object& dtype, int64_t granule,
                 const std::string& width_name) {
  const core::Width width = width_of(width_name);
  if (granule < 1) refuse("decode_indices: granule must be at least 1, got ", granule);
  const Bytes bytes("decode_indices", "code", code);
  if (bytes.info.itemsize != 1)
    refuse("decode_indices: code must be uint8, got items of ", bytes.info.itemsize, " bytes");
  if (bytes.info.ndim != 1) refuse("decode_indices: code must be 1-D, got ", bytes.info.ndim, " dimensions");
  if (count < 0) refuse("decode_indices: count must be at least 0, got ", count);
  if (limit < 0 || limit % granule != 0)
    refuse("decode_indices: limit must be a multiple of granule ", granule, " and not negative, got ", limit);
  const py::dtype wanted = py::dtype::from_args(dtype);
  const bool narrow = wanted.equal(py::dtype::of<int32_t>());
  if (!narrow && !wanted.equal(py::dtype::of<int64_t>()))
    refuse("decode_indices: dtype must be int32 or int64, got ", text_of(wanted));
  return narrow ? decode_as<int32_t>(bytes, count, limit / granule, width)
                : decode_as<int64_t>(bytes, count, limit / granule, width);
}

template <typename Number>
py::array_t<uint8_t> encode_numbers_as(const py::array& given) {
  const auto* data = static_cast<const Number*>(given.data());
  std::vector<uint8_t> code;
  {
    py::gil_scoped_release release;
    code = numbers::encode(data, given.size());
  }
  return py::array_t<uint8_t>(static_cast<py::ssize_t>(code.size()), code.data());
}

template <typename Number>
py::array decode_numbers_as(const Bytes& bytes, int64_t count) {
  py::array_t<Number> found(count);
  Number* out = found.mutable_data();
  numbers::Fault fault;
  {
    py::gil_scoped_release release;
    for (int64_t block = 0; block < numbers::block_count(count); ++block)
      if (!numbers::decode_block(bytes.data, bytes.size, count, block, out + block * numbers::kBlock, fault)) {
        fault.what += " in block " + std::to_string(block) + " (byte " + std::to_string(fault.byte) + ")";
        break;
      }
  }
  if (!fault.what.empty()) refuse("decode_numbers: code must ", fault.what);
  return found;
}

// Calls a function template with the signed number of a dtype.
template <typename Call>
auto of_number(const char* op, const py::dtype& dtype, const Call& call) {
  if (dtype.equal(py::dtype::of<int8_t>())) return call(int8_t{});
  if (dtype.equal(py::dtype::of<int16_t>())) return call(int16_t{});
  if (dtype.equal(py::dtype::of<int32_t>())) return call(int32_t{});
  if (dtype.equal(py::dtype::of<int64_t>())) return call(int64_t{});
  refuse(op, ": dtype must be int8, int16, int32 or int64, got ", text_of(dtype));
}

py::array_t<uint8_t> encode_numbers(const py::array& given) {
  if (given.ndim() != 1 || (given.size() > 1 && given.strides(0) != given.itemsize()) ||
      (given.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
    refuse("encode_numbers: numbers must be 1-D, contiguous and aligned");
  return of_number("encode_numbers", given.dtype(),
                   [&](auto number) { return encode_numbers_as<decltype(number)>(given); });
}

py::array decode_numbers(const py::buffer& code, int64_t count, const py::object& dtype) {
  const Bytes bytes("decode_numbers", "code", code);
  if (bytes.info.itemsize != 1 || bytes.info.ndim != 1) refuse("decode_numbers: code must be uint8 and 1-D");
  if (count < 0) refuse("decode_numbers: count must be at least 0, got ", count);
  const int64_t fewest = numbers::fewest_bytes(count);
  if (count == 0 ? bytes.size != 0 : bytes.size < fewest)
    refuse("decode_numbers: code must have ", count == 0 ? "" : "at least ", fewest, " bytes for ", count,
           " numbers, got ", bytes.size);
  return of_number("decode_numbers", py::dtype::from_args(dtype),
                   [&](auto number) { return decode_numbers_as<decltype(number)>(bytes, count); });
}

int64_t fingerprint(const py::buffer& weight, int64_t begin, const py::object& end, const std::string& width_name) {
  const core::Width width = width_of(width_name);
  const Bytes bytes("fingerprint", "weight", weight);
  const int64_t words = core::word_count(bytes.size), last = end.is_none() ? words : end.cast<int64_t>();
  if (begin < 0 || begin > last || last > words)
    refuse("fingerprint: begin and end must be words of the ", words, " in order, got ", begin, " and ", last);
  py::gil_scoped_release release;
  return static_cast<int64_t>(core::sum_words(bytes.data, bytes.size, begin, last, width));
}

int64_t fingerprint_part(const py::buffer& weight, int64_t first, int64_t run, int64_t stride,
                         const std::string& width_name) {
  const core::Width width = width_of(width_name);
  const Bytes bytes("fingerprint_part", "weight", weight);
  if (first < 0 || run < 1 || stride < run)
    refuse("fingerprint_part: first must be at least 0, and stride at least run, which is at least 1, got ", first,
           ", ", stride, " and ", run);
  py::gil_scoped_release release;
  const int64_t words = core::word_count(bytes.size);
  return static_cast<int64_t>(core::sum_placed(bytes.data, bytes.size, 0, words, {first, run, stride}, width));
}

struct Pair {
  Bytes one, two;
  int64_t itemsize, begin, end;

  Pair(const char* op, const py::buffer& a, const py::buffer& b, int64_t item, int64_t from, int64_t to)
      : one(op, "one", a), two(op, "two", b), itemsize(item), begin(from), end(to) {
    if (one.size != two.size) refuse(op, ": both must have the same bytes, got ", one.size, " and ", two.size);
    if (item != 1 && item != 2 && item != 4 && item != 8) refuse(op, ": itemsize must be 1, 2, 4 or 8, got ", item);
    if (from < 0 || from > to || to > one.size / item)
      refuse(op, ": begin and end must be entries of the ", one.size / item, " in order, got ", from, " and ", to);
    if (to - from > INT32_MAX) refuse(op, ": one call compares fewer than 2^31 entries, got ", to - from);
  }

  // Calls a function template with the unsigned number of an entry's size.
  template <typename Call>
  int64_t of_unit(const Call& call) const {
    switch (itemsize) {
      case 1: return call(uint8_t{});
      case 2: return call(uint16_t{});
      case 4: return call(uint32_t{});
      default: return call(uint64_t{});
    }
  }
};

py::array_t<int32_t> differing(const py::buffer& one, const py::buffer& two, int64_t itemsize, int64_t begin,
                               int64_t end, const std::string& width_name) {
  const core::Width width = width_of(width_name);
  const Pair pair("differing", one, two, itemsize, begin, end);
  // Kept between the calls of a thread: fresh memory of this size would cost more than the comparison.
  thread_local std::vector<int32_t> room;
  int64_t found = 0;
  {
    py::gil_scoped_release release;
    if (static_cast<int64_t>(room.size()) < end - begin) room.resize(static_cast<size_t>(end - begin));
    found = pair.of_unit([&](auto unit) {
      return core::differing<decltype(unit)>(pair.one.data, pair.two.data, begin, end, room.data(), width);
    });
  }
  return py::array_t<int32_t>(found, room.data());
}

int64_t count_differing(const py::buffer& one, const py::buffer& two, int64_t itemsize, int64_t begin, int64_t end) {
  const Pair pair("count_differing", one, two, itemsize, begin, end);
  py::gil_scoped_release release;
  return pair.of_unit(
      [&](auto unit) { return core::count_differing<decltype(unit)>(pair.one.data, pair.two.data, begin, end); });
}

py::array_t<uint8_t> take(const py::buffer& rows, int64_t width, const py::array_t<int32_t>& indices) {
  const Bytes from("take", "rows", rows);
  if (width < 1 || from.size % width != 0) refuse("take: width must divide ", from.size, " bytes, got ", width);
  if (indices.ndim() != 1 || (indices.size() > 1 && indices.strides(0) != 4))
    refuse("take: indices must be 1-D and contiguous");
  const int64_t count = indices.size(), most = from.size / width;
  const int32_t* at = indices.data();
  py::array_t<uint8_t> out(count * width);
  uint8_t* to = out.mutable_data();
  int64_t outside = -1;
  {
    py::gil_scoped_release release;
    // The width as a constant makes the copy of one entry a load and a store.
    const auto copy = [&](auto constant) {
      const int64_t bytes = decltype(constant)::value == 0 ? width : decltype(constant)::value;
      for (int64_t k = 0; k < count; ++k) {
        if (at[k] < 0 || at[k] >= most) {
          outside = k;
          return;
        }
        memcpy(to + k * bytes, from.data + at[k] * bytes, static_cast<size_t>(bytes));
      }
    };
    switch (width) {
      case 1: copy(std::integral_constant<int64_t, 1>{}); break;
      case 2: copy(std::integral_constant<int64_t, 2>{}); break;
      case 4: copy(std::integral_constant<int64_t, 4>{}); break;
      case 8: copy(std::integral_constant<int64_t, 8>{}); break;
      default: copy(std::integral_constant<int64_t, 0>{});
    }
  }
  if (outside >= 0) refuse("take: indices must be in [0, ", most, "), got ", at[outside], " at position ", outside);
  return out;
}

// Two buffers of floats and how many granules they hold; calls a template with their dtype.
struct Floats {
  Bytes one, two;
  std::string dtype;
  int64_t granule, granules;

  Floats(const char* op, const py::buffer& a, const py::buffer& b, const std::string& name, int64_t size)
      : one(op, "one", a), two(op, "two", b), dtype(name), granule(size) {
    const int64_t itemsize = name == "float64" ? 8 : name == "float32" ? 4 : 2;
    if (itemsize == 2 && name != "float16" && name != "bfloat16")
      refuse(op, ": dtype must be float16, bfloat16, float32 or float64, got ", name);
    if (one.size != two.size) refuse(op, ": both must have the same bytes, got ", one.size, " and ", two.size);
    if (granule < 1 || one.size % itemsize != 0 || one.size / itemsize % granule != 0)
      refuse(op, ": granule must divide the entries of ", one.size, " bytes, got ", granule);
    granules = one.size / itemsize / granule;
    if (granules > INT32_MAX) refuse(op, ": one call takes fewer than 2^31 granules, got ", granules);
  }

  template <typename Call>
  void of_dtype(const Call& call) const {
    if (dtype == "float16") return call(core::Ranks<core::Float16>{one.data, two.data, granule});
    if (dtype == "bfloat16") return call(core::Ranks<core::BFloat16>{one.data, two.data, granule});
    if (dtype == "float32") return call(core::Ranks<core::Float32>{one.data, two.data, granule});
    call(core::Ranks<core::Float64>{one.data, two.data, granule});
  }
};

py::array_t<int64_t> count_ranks(const py::buffer& one, const py::buffer& two, const std::string& dtype,
                                 int64_t granule, int shift, uint64_t last) {
  const Floats floats("count_ranks", one, two, dtype, granule);
  const int bits = dtype == "float64" ? 64 : 32;
  if (shift < 0 || shift % 16 != 0 || shift > bits - 16)
    refuse("count_ranks: shift must be a multiple of 16 below ", bits, ", got ", shift);
  py::array_t<int64_t> histogram(1 << 16);
  int64_t* out = histogram.mutable_data();
  py::gil_scoped_release release;
  std::fill(out, out + (1 << 16), 0);
  floats.of_dtype([&](const auto& ranks) { ranks.count(floats.granules, shift, last, out); });
  return histogram;
}

py::tuple take_ranks(const py::buffer& one, const py::buffer& two, const std::string& dtype, int64_t granule,
                     uint64_t last) {
  const Floats floats("take_ranks", one, two, dtype, granule);
  std::vector<int32_t> above, equal;
  {
    py::gil_scoped_release release;
    floats.of_dtype([&](const auto& ranks) {
      ranks.take(
          floats.granules, last, [&](int64_t i) { above.push_back(static_cast<int32_t>(i)); },
          [&](int64_t i) { equal.push_back(static_cast<int32_t>(i)); });
    });
  }
  const auto array = [](const std::vector<int32_t>& from) {
    return py::array_t<int32_t>(static_cast<py::ssize_t>(from.size()), from.data());
  };
  return py::make_tuple(array(above), array(equal));
}

double squared_difference(const py::buffer& one, const py::buffer& two, const std::string& dtype) {
  const Floats floats("squared_difference", one, two, dtype, 1);
  double sum = 0;
  py::gil_scoped_release release;
  floats.of_dtype([&](const auto& ranks) { sum = ranks.squares(floats.granules); });
  return sum;
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "The index code and the fingerprint of shira-ops, without torch.";
  m.def("encode", &encode, py::arg("indices"), py::kw_only(), py::arg("version") = 1, py::arg("width") = "",
        "The code of strictly increasing indices (int32 or int64, 1-D) as a uint8 array, of version 1 or 2.");
  m.def("decode", &decode, py::arg("code"), py::arg("count"), py::arg("limit"), py::arg("dtype"),
        py::arg("granule") = 1, py::kw_only(), py::arg("width") = "",
        "The `count` indices of a code. ValueError, with the block and the byte, unless the code is whole and its "
        "indices are strictly increasing in [0, limit // granule) and fit dtype (int32 or int64).");
  m.def("encode_numbers", &encode_numbers, py::arg("numbers"),
        "The code of whole numbers (int8, int16, int32 or int64, 1-D), most of them near 0, as a uint8 array.");
  m.def("decode_numbers", &decode_numbers, py::arg("code"), py::arg("count"), py::arg("dtype"),
        "The `count` numbers of a code. ValueError, with the block and the byte, unless the code is whole and its "
        "numbers fit dtype.");
  m.def("fingerprint", &fingerprint, py::arg("weight"), py::arg("begin") = 0, py::arg("end") = py::none(),
        py::kw_only(), py::arg("width") = "",
        "The fingerprint of a contiguous buffer's bytes, as the op returns it (a signed 64-bit number), or the share "
        "of its 64-bit words [begin, end): the shares of all words add up to it, mod 2^64.");
  m.def("fingerprint_part", &fingerprint_part, py::arg("weight"), py::arg("first"), py::arg("run"), py::arg("stride"),
        py::kw_only(), py::arg("width") = "",
        "What a part of a larger weight adds to its fingerprint, as the op says.");
  m.def(
      "differing", &differing, py::arg("one"), py::arg("two"), py::arg("itemsize"), py::arg("begin"), py::arg("end"),
      py::kw_only(), py::arg("width") = "",
      "The entries of [begin, end) whose bits differ in two contiguous buffers, counted from begin: int32, in order.");
  m.def("count_differing", &count_differing, py::arg("one"), py::arg("two"), py::arg("itemsize"), py::arg("begin"),
        py::arg("end"), "How many entries of [begin, end) have other bits in two contiguous buffers.");
  m.def(
      "count_ranks", &count_ranks, py::arg("one"), py::arg("two"), py::arg("dtype"), py::arg("granule"),
      py::arg("shift"), py::arg("last"),
      "How many granules' ranks, the bits of sum |two - one| (fp32, fp64 for float64), have each value of the 16 bits "
      "from shift on, among those whose bits above are last: int64 [65536].");
  m.def("take_ranks", &take_ranks, py::arg("one"), py::arg("two"), py::arg("dtype"), py::arg("granule"),
        py::arg("last"), "The granules whose rank is above last, and those where it is last: two int32 arrays.");
  m.def("squared_difference", &squared_difference, py::arg("one"), py::arg("two"), py::arg("dtype"),
        "The sum of (two - one)^2 in double, where that is a number.");
  m.def("take", &take, py::arg("rows"), py::arg("width"), py::arg("indices"),
        "Rows of width bytes of a contiguous buffer, by number (int32), one after the other: uint8.");
  m.def("widths", &widths, "The vector widths this processor has, narrowest first; the last one is the default.");
}
