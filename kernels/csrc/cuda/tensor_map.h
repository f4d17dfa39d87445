// A matrix described to Hopper's copy engine, by the driver.
#pragma once

#include "primitives_sm90.cuh"

#ifndef NIBBLE_EMULATE
#include <cuda.h>  // types only: the driver's one function is looked up at run time

#include <stdexcept>
#include <string>

namespace nibble {

// Tiles of box_rows x box_bytes (= the swizzle's width, 64 or 128) of a row-major matrix. What lies
// outside of the matrix arrives as zeros.
inline TensorMap tensor_map(const void* base, uint64_t rows, uint64_t row_bytes, uint32_t box_rows,
                            uint32_t box_bytes) {
    static_assert(sizeof(cuuint64_t) == sizeof(uint64_t));
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                          cudaEnableDefault, &result);
#else
    cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess)
        throw std::runtime_error(
            "the GPU's driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    TensorMap map;
    static_assert(sizeof(map) == sizeof(CUtensorMap));
    cuuint64_t size[2] = {row_bytes, rows}, stride[1] = {row_bytes};
    cuuint32_t box[2] = {box_bytes, box_rows}, step[2] = {1, 1};
    CUresult encoded = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
        reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2,
        const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (encoded != CUDA_SUCCESS)
        throw std::runtime_error("describing a matrix to the copy engine failed: CUDA error " +
                                 std::to_string(int(encoded)));
    return map;
}

}  // namespace nibble
#endif
