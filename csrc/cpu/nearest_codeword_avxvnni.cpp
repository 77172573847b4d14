// The AVX2 search kernel with byte and 16-bit products on AVX-VNNI (processors without AVX-512: Intel Alder Lake and later).
#ifndef VQK_NO_AVXVNNI
#define VQK_VNNI
#include "nearest_codeword_avx2.cpp"
#endif
