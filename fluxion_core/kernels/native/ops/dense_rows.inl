// Rows through one layer of a network, in fp32. Lanes are columns; a panel of weights serves a tile of
// rows at a time, so that a loaded weight is used for all of them, and stays in the cache for the
// next tile. The sum of an element runs over its inputs in order, whatever the tile.

namespace {

constexpr int kPanelVectors = fluxion::kPanelColumns / F32::kLanes;
// Sums of a tile, the panel's vectors and one input stay in registers.
constexpr int kTileRows = kPanelVectors == 1 ? 12 : 6;

struct DensePanel {
  const float* input;
  int64_t input_stride;
  int32_t depth;
  const float* weights;
  const float* bias;
  bool relu;
  float* output;
  int64_t output_stride;
};

template <int ROWS>
inline void dense_tile(const DensePanel& panel, int32_t row) {
  F32 sums[ROWS][kPanelVectors];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = load(panel.bias + v * F32::kLanes);
  }
  const float* input = panel.input + row * panel.input_stride;
  for (int32_t k = 0; k < panel.depth; ++k) {
    const float* weights = panel.weights + int64_t(k) * fluxion::kPanelColumns;
    F32 weight[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) weight[v] = load(weights + v * F32::kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const F32 value = broadcast(input[r * panel.input_stride + k]);
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = fma(weight[v], value, sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    float* to = panel.output + (row + r) * panel.output_stride;
    for (int v = 0; v < kPanelVectors; ++v) {
      store(to + v * F32::kLanes, panel.relu ? max(sums[r][v], zero()) : sums[r][v]);
    }
  }
}

template <int ROWS>
inline void dense_tile_of(const DensePanel& panel, int32_t row, int32_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return dense_tile_of<ROWS - 1>(panel, row, rows);
  }
  dense_tile<ROWS>(panel, row);
}

void dense_rows(const float* input, int64_t input_stride, int32_t rows, int32_t depth,
                const float* panels, const float* bias, int32_t num_panels, bool relu,
                float* output, int64_t output_stride) {
  const int32_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int32_t in_tile = tiles ? (rows + tiles - 1) / tiles : 0;
  for (int32_t p = 0; p < num_panels; ++p) {
    const DensePanel panel{input,
                           input_stride,
                           depth,
                           panels + int64_t(p) * depth * fluxion::kPanelColumns,
                           bias + p * fluxion::kPanelColumns,
                           relu,
                           output + p * fluxion::kPanelColumns,
                           output_stride};
    for (int32_t row = 0; row < rows; row += in_tile) {
      dense_tile_of<kTileRows>(panel, row, rows - row < in_tile ? rows - row : in_tile);
    }
  }
}

}  // namespace
