// The AVX-512 search kernel with the integer coarse pass on VNNI (Intel Cascade Lake, AMD Zen 4 and later).
#define VQK_VNNI
#include "nearest_codeword_avx512.cpp"
