// What Python sees of sampling; see module.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "sampling/token_sampler.h"

namespace nb = nanobind;

namespace fluxion {

void bind_sampling(nb::module_& m) {
  nb::class_<TokenSampler>(m, "TokenSampler")
      .def("__init__",
           [](TokenSampler* self, double temperature, int64_t top_k, double top_p, double min_p,
              double repetition, double presence, double frequency, uint64_t seed) {
             new (self) TokenSampler({temperature, top_k, top_p, min_p},
                                     {repetition, presence, frequency}, seed);
           })
      .def("see", [](TokenSampler& self, const std::vector<int32_t>& ids) {
        self.see(ids.data(), int64_t(ids.size()));
      })
      .def("take", [](TokenSampler& self, const std::vector<int32_t>& ids) {
        for (const int32_t id : ids) self.take(id);
      })
      .def("set_position", &TokenSampler::set_position);
  // One row without penalties, by noise of 53 bits.
  m.def("choose_token", [](uintptr_t logits, int32_t vocab, double temperature, int64_t top_k,
                           double top_p, double min_p, uint64_t noise) {
    nb::gil_scoped_release unlocked;
    const ChoiceRules rules{temperature, top_k, top_p, min_p};
    const float* row = reinterpret_cast<const float*>(logits);
    const Choice choice = choose_token(row, vocab, rules, noise);
    return std::make_pair(choice.token, choice.largest);
  });
  // Of each row its token, -1 if none can be chosen, and its largest logit.
  m.def("sample_rows",
        [](TaskPool* pool, const std::vector<TokenSampler*>& samplers, uintptr_t logits,
           int64_t row_stride, int32_t vocab, int64_t wake_bytes) {
          std::vector<std::pair<int32_t, float>> choices;
          nb::gil_scoped_release unlocked;
          SamplingRound round(samplers, reinterpret_cast<const float*>(logits), row_stride, vocab);
          for (const Choice& choice : round.run(pool, wake_bytes)) {
            choices.emplace_back(choice.token, choice.largest);
          }
          return choices;
        },
        nb::arg("pool").none(), nb::arg("samplers"), nb::arg("logits"), nb::arg("row_stride"),
        nb::arg("vocab"), nb::arg("wake_bytes"));
}

}  // namespace fluxion
