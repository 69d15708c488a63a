// A prompt's KV on its way in: from a hand-off's connections into the slabs of one sequence.
//
// A frame is received into a buffer that stays in the cache, checked, digested and copied past the cache;
// with payloads beside the stream it is taken in from where it lies. Layers belong to connections, so
// that each layer's frames come in order and one thread alone writes it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "operations/slab_layout.h"
#include "plane/handoff.h"

namespace fluxion {

class KvLanding : public Handoff {
 public:
  struct State {
    int64_t payload_bytes, chunks;  // of frames that were taken in
    int64_t tokens_taken;           // from the prompt's first; a layer counts for its share
    int64_t received_bytes;         // with prefixes, and of frames under way
    bool is_whole;
    std::optional<PlaneError> error;  // the first one; nothing is taken in afterwards
  };

  // slabs: address of each slab of the sequence, in token order, `num_slabs` of them; copied. Those that
  // hold tokens from kv_from_token on must stay until `close` has returned, and so must event_fd.
  // Throws std::invalid_argument.
  KvLanding(IoThreads& threads, const SlabLayout& layout, const int64_t* slabs, int64_t num_slabs,
            int64_t num_tokens, int64_t kv_from_token, int event_fd);
  ~KvLanding();

  State state() const;
  // Tokens, from the prompt's first, that are written in every layer.
  int64_t whole_tokens() const;

 private:
  friend class LandingConnection;

  void note_received(int64_t bytes);
  void note_taken(int64_t layer, int64_t next_token, int64_t payload_bytes);
  void note_whole(int64_t layers);
  std::shared_ptr<Connection> make_connection(std::unique_ptr<Transport> transport,
                                              int64_t connection, int64_t of) override;

  const SlabLayout layout_;
  const std::vector<int64_t> slabs_;
  const int64_t num_tokens_;
  std::vector<std::atomic<int64_t>>
      next_token_;  // [layers]; each written by its connection's thread
  std::atomic<int64_t> payload_bytes_{0}, chunks_{0}, received_bytes_{0}, layers_left_;
  std::atomic<int64_t> raised_ns_{0};
};

}  // namespace fluxion
