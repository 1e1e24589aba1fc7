// Packing: numbers are transposed, so that what was strided becomes contiguous, and converted to the compute type.
// Included once for each vector width, in its namespace: Floats and Doubles are the registers of that width, and
// SHIRA_TARGET lets the compiler use its instructions.

// One square tile: kLanes tokens of kLanes columns, transposed so that a column's tokens lie in a row.
template <typename Registers, typename D>
SHIRA_TARGET inline void pack_tile(const typename D::Bits* from, int64_t stride, typename Registers::Value* to,
                                   int64_t depth, int64_t columns) {
  constexpr int kLanes = Registers::kLanes;
  typename Registers::Register r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = Registers::load(Source<D>{from + i * stride});
  Registers::transpose(r);
  if (columns >= kLanes) {
    for (int i = 0; i < kLanes; ++i) Registers::store(to + i * depth, r[i]);
  } else {
    for (int i = 0; i < columns; ++i) Registers::store(to + i * depth, r[i]);
  }
}

// to[column * depth + token] = from[token * stride + column], as `Value`; tokens past the last are zeros. `depth` is a
// multiple of kLanes.
template <typename Registers, typename D>
SHIRA_TARGET void pack(const typename D::Bits* from, int64_t stride, int64_t tokens, int64_t columns,
                       typename Registers::Value* to, int64_t depth) {
  using Bits = typename D::Bits;
  constexpr int64_t kLanes = Registers::kLanes;
  for (int64_t token = 0; token < depth; token += kLanes) {
    const int64_t tall = std::min(kLanes, tokens - token);
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t wide = std::min(kLanes, columns - column);
      const Bits* tile = from + token * stride + column;
      typename Registers::Value* const place = to + column * depth + token;
      if (tall == kLanes && wide == kLanes) {
        pack_tile<Registers, D>(tile, stride, place, depth, kLanes);
        continue;
      }
      Bits edge[kLanes * kLanes] = {};  // whole registers must not be read past the end of the tensor
      for (int64_t i = 0; i < tall; ++i) memcpy(edge + i * kLanes, tile + i * stride, wide * sizeof(Bits));
      pack_tile<Registers, D>(edge, kLanes, place, depth, wide);
    }
  }
}

// `pack` of bfloat16 as it is: a lane holds two tokens, the second of which is kLanes further. `depth` is a multiple of
// 2 * kLanes, and of each column half as many lanes are stored.
template <typename Registers>
SHIRA_TARGET void pack_pairs(const uint16_t* from, int64_t stride, int64_t tokens, int64_t columns, float* to,
                             int64_t depth) {
  using D = core::BFloat16;
  constexpr int64_t kLanes = Registers::kLanes;
  for (int64_t token = 0; token < depth; token += 2 * kLanes) {
    const int64_t tall = std::min(2 * kLanes, tokens - token);
    for (int64_t column = 0; column < columns; column += kLanes) {
      const int64_t wide = std::min(kLanes, columns - column);
      const uint16_t* tile = from + token * stride + column;
      int64_t line = stride;
      uint16_t edge[2 * kLanes * kLanes];
      if (tall < 2 * kLanes || wide < kLanes) {  // whole registers must not be read past the end of the tensor
        std::fill_n(edge, 2 * kLanes * kLanes, 0);
        for (int64_t i = 0; i < tall; ++i) memcpy(edge + i * kLanes, tile + i * stride, wide * sizeof(uint16_t));
        tile = edge;
        line = kLanes;
      }
      typename Registers::Register r[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        r[i] = Registers::pair(Registers::load(Source<D>{tile + i * line}),
                               Registers::load(Source<D>{tile + (kLanes + i) * line}));
      Registers::transpose(r);
      float* const place = to + (column * depth + token) / 2;
      for (int64_t i = 0; i < wide; ++i) Registers::store(place + i * (depth / 2), r[i]);
    }
  }
}
