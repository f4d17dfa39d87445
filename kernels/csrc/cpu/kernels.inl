// Everything that is compiled once for each instruction set, inside an unnamed namespace: nothing
// of it is visible to another file.
#include "floats.inl"
#include "quantize_down.inl"
#include "gemm_w4a4.inl"
#include "gelu.inl"
#include "w4a16.inl"
#include "vq.inl"
#include "w4a8.inl"
