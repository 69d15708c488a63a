// What Python sees of sampling.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "sampling/token_sampler.h"

namespace fluxion {

void bind_sampling(nb::module_& m) {
  nb::class_<TokenSampler>(m, "TokenSampler")
      .def("__init__",
           [](TokenSampler* self, double temperature, int64_t top_k, double top_p, double min_p,
              double repetition, double presence, double frequency, uint64_t seed) {
             new (self) TokenSampler({temperature, top_k, top_p, min_p},
                                     {repetition, presence, frequency}, seed);
           })
      .def("see",
           [](TokenSampler& self, const std::vector<int32_t>& ids) {
             self.see(ids.data(), int64_t(ids.size()));
           })
      .def("take",
           [](TokenSampler& self, const std::vector<int32_t>& ids) {
             for (const int32_t id : ids) self.take(id);
           })
      .def("set_position", &TokenSampler::set_position);
  // One row [vocab] float32 without penalties, by noise of 53 bits.
  m.def("choose_token", [](const Array& logits, double temperature, int64_t top_k, double top_p,
                           double min_p, uint64_t noise) {
    const float* row = values<float>(logits, "logits", {kAnyLength});
    const int32_t vocab = int32_t(logits.shape(0));
    nb::gil_scoped_release unlocked;
    const Choice choice = choose_token(row, vocab, {temperature, top_k, top_p, min_p}, noise);
    return std::make_pair(choice.token, choice.largest);
  });
  // Of each row [vocab] its token, -1 if none can be chosen, and its largest logit. Rows may lie apart.
  m.def(
      "sample_rows",
      [](TaskPool* pool, const std::vector<TokenSampler*>& samplers, const Array& logits,
         int64_t wake_bytes) {
        const Rows<float> from =
            rows<float>(logits, "logits", {int64_t(samplers.size()), kAnyLength});
        const int32_t vocab = int32_t(logits.shape(1));
        std::vector<std::pair<int32_t, float>> choices;
        nb::gil_scoped_release unlocked;
        SamplingRound round(samplers, from.first, from.stride, vocab);
        for (const Choice& choice : round.run(pool, wake_bytes)) {
          choices.emplace_back(choice.token, choice.largest);
        }
        return choices;
      },
      nb::arg("pool").none(), nb::arg("samplers"), nb::arg("logits"), nb::arg("wake_bytes"));
}

}  // namespace fluxion
