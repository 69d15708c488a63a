// What lies between the products of a decoder's layer, in fp32: norm and gate. An element is computed
// the same way whatever rows are beside it. Widths are multiples of kPanelColumns, filled with zeros.

namespace {

void add_norm_row(float* x, const float* delta, const float* weight, float epsilon, int32_t width,
                  int32_t padded_width, float* normed) {
  F32 squares = zero();
  for (int32_t i = 0; i < padded_width; i += F32::kLanes) {
    F32 value = load(x + i);
    if (delta) {
      value = add(value, load(delta + i));
      store(x + i, value);
    }
    squares = fma(value, value, squares);
  }
  const F32 scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / float(width) + epsilon));
  for (int32_t i = 0; i < padded_width; i += F32::kLanes) {
    store(normed + i, mul(mul(load(x + i), scale), load(weight + i)));
  }
}

// x / (1 + e^-x), neither power above 1: (e^min(x, 0)) / (1 + e^-|x|).
inline F32 silu(F32 x) {
  const F32 negated = sub(zero(), x), base = broadcast(1.44269504088896340736f);
  const F32 below = sub(zero(), max(negated, zero()));
  const F32 away = sub(zero(), max(x, negated));
  const F32 share = exp2_nonpositive(mul(below, base));
  return div(mul(x, share), add(broadcast(1.0f), exp2_nonpositive(mul(away, base))));
}

void gate_rows(const float* gate_up, int64_t gate_up_stride, int32_t rows, int32_t num_panels,
               float* gated, int64_t gated_stride) {
  for (int32_t row = 0; row < rows; ++row) {
    const float* from = gate_up + row * gate_up_stride;
    float* to = gated + row * gated_stride;
    for (int32_t p = 0; p < num_panels; ++p, from += 2 * fluxion::kPanelColumns) {
      for (int32_t i = 0; i < fluxion::kPanelColumns; i += F32::kLanes, to += F32::kLanes) {
        store(to, mul(silu(load(from + i)), load(from + fluxion::kPanelColumns + i)));
      }
    }
  }
}

}  // namespace
