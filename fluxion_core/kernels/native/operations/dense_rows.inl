// Rows times a matrix of weights, in fp32; weights may be bf16 in memory. Lanes are columns; a panel of weights serves a tile of rows
// at a time, so that a loaded weight is used for all of them. The sum of an element runs over its
// inputs in order, one at a time: it is the same bits whatever rows are beside it.

namespace {

constexpr int kPanelVectors = fluxion::kPanelColumns / F32::kLanes;
// Sums of a tile, the panel's vectors and one input stay in registers.
constexpr int kTileRows = kPanelVectors == 1 ? 12 : 6;
// Of a panel, the inputs that stay in the cache while one tile of rows after the other uses them.
constexpr int32_t kDepthBlock = 1024;

// A part of a panel: the inputs from `begin` to `end`.
template <class WEIGHT>
struct DensePanel {
  const float* input;
  int64_t input_stride;
  int32_t begin, end;
  const WEIGHT* weights;
  const float* bias;  // null: go on from what `output` holds
  bool relu;
  float* output;
  int64_t output_stride;
};

template <int ROWS, class WEIGHT>
inline void dense_tile(const DensePanel<WEIGHT>& panel, int32_t row) {
  F32 sums[ROWS][kPanelVectors];
  float* output = panel.output + row * panel.output_stride;
  for (int r = 0; r < ROWS; ++r) {
    const float* from = panel.bias ? panel.bias : output + r * panel.output_stride;
    for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = load(from + v * F32::kLanes);
  }
  const float* input = panel.input + row * panel.input_stride;
  for (int32_t k = panel.begin; k < panel.end; ++k) {
    const WEIGHT* weights = panel.weights + int64_t(k) * fluxion::kPanelColumns;
    F32 weight[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) weight[v] = load(weights + v * F32::kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const F32 value = broadcast(input[r * panel.input_stride + k]);
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = fma(weight[v], value, sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float* to = output + r * panel.output_stride;
    for (int v = 0; v < kPanelVectors; ++v) {
      store(to + v * F32::kLanes, panel.relu ? max(sums[r][v], zero()) : sums[r][v]);
    }
  }
}

template <int ROWS, class WEIGHT>
inline void dense_tile_of(const DensePanel<WEIGHT>& panel, int32_t row, int32_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return dense_tile_of<ROWS - 1>(panel, row, rows);
  }
  dense_tile<ROWS>(panel, row);
}

template <class WEIGHT>
inline void dense_rows_of(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                          const WEIGHT* panels, const float* bias, int32_t num_panels, bool relu,
                          float* output, int64_t output_stride) {
  const int32_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int32_t in_tile = tiles ? (rows + tiles - 1) / tiles : 0;
  const int32_t block = tiles > 1 ? kDepthBlock : depth;
  for (int32_t p = 0; p < num_panels; ++p) {
    for (int32_t begin = 0; begin < depth; begin += block) {
      const int32_t end = depth - begin < block ? depth : begin + block;
      const DensePanel<WEIGHT> panel{input,
                                     input_stride,
                                     begin,
                                     end,
                                     panels + int64_t(p) * depth * fluxion::kPanelColumns,
                                     begin ? nullptr : bias + p * fluxion::kPanelColumns,
                                     relu && end == depth,
                                     output + p * fluxion::kPanelColumns,
                                     output_stride};
      for (int32_t row = 0; row < rows; row += in_tile) {
        dense_tile_of<kTileRows>(panel, row, rows - row < in_tile ? rows - row : in_tile);
      }
    }
  }
}

void dense_rows(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                const float* panels, const float* bias, int32_t num_panels, bool relu,
                float* output, int64_t output_stride) {
  dense_rows_of(input, input_stride, rows, depth, panels, bias, num_panels, relu, output,
                output_stride);
}

void dense_rows_bf16(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                     const uint16_t* panels, const float* bias, int32_t num_panels, bool relu,
                     float* output, int64_t output_stride) {
  dense_rows_of(input, input_stride, rows, depth, panels, bias, num_panels, relu, output,
                output_stride);
}

}  // namespace
