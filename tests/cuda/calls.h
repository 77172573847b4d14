// How an operator's CUDA launcher is called by the tests. To add one, write tests/cuda/<file>.cpp beside
// csrc/cuda/<file>.cu:
//
//     #include "calls.h"
//
//     VQK_CALL(codebook_usage) {           // the operator's name in vqkernels/registry.py; several a file if need be
//       const Array& indices = call.in(0);  // the arguments in the order of its schema, contiguous
//       return vqk::cuda::codebook_usage({.indices = indices.as<int64_t>(), .counts = call.out(0).as<int64_t>(),
//                                         .bad = nullptr, .S = indices.size(0), .N = indices.size(1),
//                                         .K = call.integer(1)}, nullptr);
//     }
//
// tests/test_cuda.py finds it, and runs the registry's samples and edges and those of tests/cuda_cases.py, which is
// where cases belong that reach the remaining kernels (it says which were never launched).
//
// Every array is an allocation of its own and of the exact size (ASan sees one byte too far), misaligned where the case
// is; outputs and workspaces start as 0xFF in every byte.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "vqk/launch.h"

namespace vqk::emulator {

struct Array {
  unsigned char* data = nullptr;  // null where there are no elements, or no tensor
  std::vector<int64_t> shape;
  int type = -1;  // DType, 4 int64, 5 int32, 6 bool, -1 no tensor

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  int64_t size(int dim) const { return shape.at(dim); }
  DType dtype() const { return static_cast<DType>(type); }
  int64_t bytes() const;
};

class Call {
 public:
  const Array& in(int argument) const { return arguments.at(argument).arrays.at(0); }
  const std::vector<Array>& list(int argument) const { return arguments.at(argument).arrays; }  // Tensor[]
  int64_t integer(int argument) const { return arguments.at(argument).integers.at(0); }         // int or bool
  const std::vector<int64_t>& integers(int argument) const { return arguments.at(argument).integers; }  // int[]
  const Array& out(int number) const { return outputs.at(number); }
  void* workspace(int64_t bytes);

  struct Argument {
    std::vector<int64_t> integers;
    std::vector<Array> arrays;
  };
  std::vector<Argument> arguments;
  std::vector<Array> outputs;
};

using Function = const char* (*)(Call&);  // null, or what was refused
bool add_call(const char* op, Function);

}  // namespace vqk::emulator

using vqk::emulator::Array;

#define VQK_CALL(op)                                                          \
  static const char* call_##op(vqk::emulator::Call&);                         \
  static const bool added_##op = vqk::emulator::add_call(#op, call_##op);     \
  static const char* call_##op([[maybe_unused]] vqk::emulator::Call& call)
