// shira._codec: the index code and the fingerprint on numpy arrays and buffers, so that an adapter's file can be
// read and checked without importing torch. One thread, without the GIL; the same bits and the same refusals as
// the ops, as ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <vector>

#include "../core/codec.h"
#include "../core/difference.h"
#include "../core/fingerprint.h"

namespace py = pybind11;
namespace core = shira::core;
namespace codec = shira::core::codec;

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
py::array_t<uint8_t> encode_as(const py::array& indices, core::Width width) {
  const auto* data = static_cast<const Index*>(indices.data());
  const int64_t count = indices.size();
  codec::Encoder<Index> encoder(data, count, width);
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

py::array_t<uint8_t> encode(const py::array& indices, const std::string& width_name) {
  const core::Width width = width_of(width_name);
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
  return narrow ? encode_as<int32_t>(indices, width) : encode_as<int64_t>(indices, width);
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

int64_t fingerprint(const py::buffer& weight, int64_t begin, const py::object& end, const std::string& width_name) {
  const core::Width width = width_of(width_name);
  const Bytes bytes("fingerprint", "weight", weight);
  const int64_t words = core::word_count(bytes.size), last = end.is_none() ? words : end.cast<int64_t>();
  if (begin < 0 || begin > last || last > words)
    refuse("fingerprint: begin and end must be words of the ", words, " in order, got ", begin, " and ", last);
  py::gil_scoped_release release;
  return static_cast<int64_t>(core::sum_words(bytes.data, bytes.size, begin, last, width));
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
                               int64_t end) {
  const Pair pair("differing", one, two, itemsize, begin, end);
  // Kept between the calls of a thread: fresh memory of this size would cost more than the comparison.
  thread_local std::vector<int32_t> room;
  int64_t found = 0;
  {
    py::gil_scoped_release release;
    if (static_cast<int64_t>(room.size()) < end - begin) room.resize(static_cast<size_t>(end - begin));
    found = pair.of_unit([&](auto unit) {
      return core::differing<decltype(unit)>(pair.one.data, pair.two.data, begin, end, room.data());
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

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "The index code and the fingerprint of shira-ops, without torch.";
  m.def("encode", &encode, py::arg("indices"), py::kw_only(), py::arg("width") = "",
        "The code of strictly increasing indices (int32 or int64, 1-D) as a uint8 array.");
  m.def("decode", &decode, py::arg("code"), py::arg("count"), py::arg("limit"), py::arg("dtype"),
        py::arg("granule") = 1, py::kw_only(), py::arg("width") = "",
        "The `count` indices of a code. ValueError, with the block and the byte, unless the code is whole and its "
        "indices are strictly increasing in [0, limit // granule) and fit dtype (int32 or int64).");
  m.def("fingerprint", &fingerprint, py::arg("weight"), py::arg("begin") = 0, py::arg("end") = py::none(),
        py::kw_only(), py::arg("width") = "",
        "The fingerprint of a contiguous buffer's bytes, as the op returns it (a signed 64-bit number), or the share "
        "of its 64-bit words [begin, end): the shares of all words add up to it, mod 2^64.");
  m.def(
      "differing", &differing, py::arg("one"), py::arg("two"), py::arg("itemsize"), py::arg("begin"), py::arg("end"),
      "The entries of [begin, end) whose bits differ in two contiguous buffers, counted from begin: int32, in order.");
  m.def("count_differing", &count_differing, py::arg("one"), py::arg("two"), py::arg("itemsize"), py::arg("begin"),
        py::arg("end"), "How many entries of [begin, end) have other bits in two contiguous buffers.");
  m.def("widths", &widths, "The vector widths this processor has, narrowest first; the last one is the default.");
}
