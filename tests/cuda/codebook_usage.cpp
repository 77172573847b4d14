#include "calls.h"

VQK_CALL(codebook_usage) {
  const Array& indices = call.in(0);
  return vqk::cuda::codebook_usage({.indices = indices.as<int64_t>(),
                                    .counts = call.out(0).as<int64_t>(),
                                    .bad = nullptr,
                                    .S = indices.size(0),
                                    .N = indices.size(1),
                                    .K = call.integer(1)},
                                   nullptr);
}
