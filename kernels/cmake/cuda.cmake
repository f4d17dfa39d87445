# GPU architectures, a source at a time. CMAKE_CUDA_ARCHITECTURES is one list a target, and here
# every family has its own files:
#   sm75.cu              75
#   sm80.cu              80 86 89
#   sm90.cu, sm90/*.cu   90a
#   sm100.cu             90a 100f 120f and PTX
#   sm120.cu             120f
#   any other .cu        all, and PTX
# The PTX is compute_80: the driver compiles it for whatever comes after the newest architecture
# here (see README.md).
set(CMAKE_CUDA_ARCHITECTURES OFF)
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
    if(NIBBLE_CUDA STREQUAL "ON")
        message(FATAL_ERROR
                "nibble: NIBBLE_CUDA=ON and no nvcc was found; put it on PATH or set CUDACXX")
    endif()
    message(STATUS "nibble: no nvcc found, so the CPU alone; "
                   "to include CUDA put nvcc on PATH or set CUDACXX")
    return()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    if(NIBBLE_CUDA STREQUAL "ON")
        message(FATAL_ERROR "nibble: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0")
    endif()
    message(STATUS
            "nibble: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.0, so the CPU alone")
    return()
endif()

# "native": the GPUs in this machine, each with the features of its own family.
if(NIBBLE_CUDA_ARCHS STREQUAL "native")
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE NIBBLE_CUDA_ARCHS RESULT_VARIABLE failed)
    if(failed)
        message(FATAL_ERROR "nibble: NIBBLE_CUDA_ARCHS=native and nvidia-smi finds no GPU")
    endif()
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" NIBBLE_CUDA_ARCHS "${NIBBLE_CUDA_ARCHS}")
    string(REPLACE "." "" NIBBLE_CUDA_ARCHS "${NIBBLE_CUDA_ARCHS}")
    string(REGEX REPLACE "90" "90a" NIBBLE_CUDA_ARCHS "${NIBBLE_CUDA_ARCHS}")
    string(REGEX REPLACE "1([02])[0-9]" "1\\10f" NIBBLE_CUDA_ARCHS "${NIBBLE_CUDA_ARCHS}")
    list(REMOVE_DUPLICATES NIBBLE_CUDA_ARCHS)
endif()

# Hopper is in no Windows PC, and MSVC lays the copy engine's map out with another alignment.
if(WIN32)
    list(REMOVE_ITEM NIBBLE_CUDA_ARCHS 90a)
endif()

# What this nvcc can compile for. Families (100f) came with 12.9; before it the one chip (100a), and
# before 12.8 neither.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known)
string(REGEX MATCHALL "sm_[0-9]+[af]?" known "${known}")
set(archs "")
foreach(arch ${NIBBLE_CUDA_ARCHS})
    string(REGEX REPLACE "[af]$" "" number "${arch}")
    if(arch MATCHES "f$" AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.9)
        list(APPEND archs "${arch}")
    elseif(arch MATCHES "f$" AND ("sm_${number}a" IN_LIST known OR "sm_${number}" IN_LIST known))
        list(APPEND archs "${number}a")
    elseif("sm_${arch}" IN_LIST known)
        list(APPEND archs "${arch}")
    elseif(arch MATCHES "a$" AND "sm_${number}" IN_LIST known)  # may name plain numbers only
        list(APPEND archs "${arch}")
    else()
        message(WARNING "nibble: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know sm_${arch}, "
                        "which is left out; newer GPUs run the PTX")
    endif()
endforeach()
if(NOT archs)
    message(FATAL_ERROR "nibble: none of NIBBLE_CUDA_ARCHS=${NIBBLE_CUDA_ARCHS} is known to "
                        "nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
endif()

file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
set(pattern_sm75 "^75$")
set(pattern_sm80 "^8[0-9]$")
set(pattern_sm90 "^90a?$")
# Hopper runs what has no wgmma version, such as the fused GELU, through these
set(pattern_sm100 "^(90a?|1[0-9][0-9][af]?)$")
set(pattern_sm120 "^12[01][af]$")
foreach(source ${cuda_sources})
    file(RELATIVE_PATH name "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda" "${source}")
    set(pattern ".*")
    set(ptx TRUE)
    if(name MATCHES "/(sm75|sm80|sm90|sm100|sm120)(/[a-z_0-9]+)?\\.cu$")
        set(pattern "${pattern_${CMAKE_MATCH_1}}")
        if(NOT CMAKE_MATCH_1 STREQUAL "sm100")
            set(ptx FALSE)
        endif()
    endif()
    set(flags "")
    foreach(arch ${archs})
        if(arch MATCHES "${pattern}")
            list(APPEND flags "-gencode=arch=compute_${arch},code=sm_${arch}")
        endif()
    endforeach()
    # A file without any architecture of its own still defines what the router links to, so it is
    # compiled as PTX, never run.
    if(ptx OR NOT flags)
        set(floor 80)
        if(NOT flags AND name MATCHES "/sm90")
            set(floor 90a)
        elseif(NOT flags AND name MATCHES "/sm75")
            set(floor 75)
        endif()
        list(APPEND flags "-gencode=arch=compute_${floor},code=compute_${floor}")
    endif()
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
endforeach()
target_sources(nibble_kernels PRIVATE ${cuda_sources})

# -Xptxas -v prints registers, shared memory and spills of every kernel into the build's log;
# check_resources.py bounds them.
set(nvcc_flags -O3 --expt-relaxed-constexpr -Xptxas=-v,-warn-spills)
if(MSVC)
    list(APPEND nvcc_flags -Xcompiler=/Zc:preprocessor)
endif()
target_compile_options(nibble_kernels PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${nvcc_flags}>")
set_target_properties(nibble_kernels PROPERTIES
                      CUDA_ARCHITECTURES OFF CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                      CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static
                      CUDA_SEPARABLE_COMPILATION OFF)
target_include_directories(nibble_kernels PRIVATE "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
list(JOIN archs " " names)
target_compile_definitions(nibble_kernels PRIVATE NIBBLE_CUDA
                           "NIBBLE_ARCHITECTURES=\"${names} ptx80\""
                           "NIBBLE_CUDA_VERSION=\"${CMAKE_CUDA_COMPILER_VERSION}\"")
message(STATUS "nibble: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${names}, and PTX")
