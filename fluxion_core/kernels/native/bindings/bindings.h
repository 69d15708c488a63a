// A file binds what its name says; module.cpp calls them all.
#pragma once

#include <nanobind/nanobind.h>

namespace fluxion {

void bind_attention(nanobind::module_& m);
void bind_dense(nanobind::module_& m);
void bind_lane(nanobind::module_& m);
void bind_needs(nanobind::module_& m);
void bind_operations(nanobind::module_& m);
void bind_plane(nanobind::module_& m);
void bind_planner(nanobind::module_& m);
void bind_pool(nanobind::module_& m);
void bind_sampling(nanobind::module_& m);
void bind_store(nanobind::module_& m);

}  // namespace fluxion
