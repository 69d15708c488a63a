// Reads pieces of memory as the other operations do, the next one prefetched, and adds their words.

namespace {

uint64_t read_pieces(const char* const* pieces, int64_t num_pieces, int64_t piece_bytes) {
  uint64_t total = 0;
  for (int64_t i = 0; i < num_pieces; ++i) {
    const char* next = pieces[i + 1 < num_pieces ? i + 1 : i];
    Words sum = zero_words();
    for (int64_t offset = 0; offset < piece_bytes; offset += 256) {
      for (int line = 0; line < 256; line += 64) prefetch(next + offset + line);
      sum = add_words(sum, pieces[i] + offset);
    }
    total += total_words(sum);
  }
  return total;
}

}  // namespace
