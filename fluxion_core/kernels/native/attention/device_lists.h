// What the host is to read of a layer, listed by the device that chose it.
//
// A unit is a block of 16 tokens of a row's sequence, inside its region; units ascend. A mask's bit h says
// that query head h of the group reads the unit. What else a group chose lies in the device's memory, and
// is attended to there.
#pragma once

#include <cstdint>

namespace fluxion {

struct DeviceLists {
  const int32_t* units;         // [rows][kv_heads][stride]
  const int32_t* masks;         // [rows][kv_heads][stride]
  const int32_t* counts;        // [rows][kv_heads] units in each list
  int64_t stride;               // room of a list, in units
  const int32_t* device_units;  // as `units`, where the GPU lane reads them
  const int32_t* device_masks;
};

}  // namespace fluxion
