// The loop of sampled_grad over packed columns. Included once for each vector width, in its namespace: Floats and
// Doubles are the registers of that width, and SHIRA_TARGET lets the compiler use its instructions.

// to[k] (+)= the dot product of `left` and the packed column at right + offsets[k]. An entry's sum depends on its two
// columns alone, not on its neighbours or on where a thread's share ends.
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
