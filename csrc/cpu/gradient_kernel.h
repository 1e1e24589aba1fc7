// The two loops of sampled_grad. Included once for each vector width, in its namespace: Floats and Doubles are the
// registers of that width, and SHIRA_TARGET lets the compiler use its instructions.

// One square tile: kLanes tokens of kLanes columns, turned so that a column's tokens lie in a row.
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

// to[k] (+)= the dot of `left` with the packed column at right + offsets[k]. An entry's sum depends on nothing but its
// two columns: neither on its neighbours nor on where a thread's share ends.
template <typename Registers>
SHIRA_TARGET void dots(const typename Registers::Value* left, const typename Registers::Value* right,
                       const int64_t* offsets, int64_t count, int64_t depth, typename Registers::Value* to, bool add) {
  using Value = typename Registers::Value;
  typename Registers::Register sums[kGroup];
  Value group[kGroup];
  for (int64_t from = 0; from < count; from += kGroup) {
    const int64_t here = std::min<int64_t>(kGroup, count - from);
    const Value* columns[kGroup];
    for (int k = 0; k < kGroup; ++k) {
      columns[k] = right + offsets[std::min(from + k, count - 1)];
      sums[k] = Registers::zero();
    }
    if (here > kGroup / 2) {
      for (int64_t token = 0; token < depth; token += Registers::kLanes) {
        const auto shared = Registers::load(left + token);
        for (int k = 0; k < kGroup; ++k)
          sums[k] = Registers::multiply_add(shared, Registers::load(columns[k] + token), sums[k]);
      }
    } else {
      for (int64_t token = 0; token < depth; token += Registers::kLanes) {
        const auto shared = Registers::load(left + token);
        for (int k = 0; k < kGroup / 2; ++k)
          sums[k] = Registers::multiply_add(shared, Registers::load(columns[k] + token), sums[k]);
      }
    }
    Registers::sum(sums, group);
    for (int64_t k = 0; k < here; ++k) to[from + k] = add ? to[from + k] + group[k] : group[k];
  }
}
