// The search kernel for AMX (Intel Sapphire Rapids and later): VNNI's, with most products of bytes on tiles.
#ifndef VQK_NO_AMX
#define VQK_TILES
#define VQK_VNNI
#include "nearest_codeword_avx512.cpp"
#endif
