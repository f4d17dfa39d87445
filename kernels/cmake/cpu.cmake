# Instruction sets of the CPU sources, by file name: *_avx2.cpp and *_avx512.cpp are compiled for
# theirs and called only where the CPU has it; everything else, the module too, for the platform's
# baseline, so that one binary runs on any machine.
string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
set(x86 FALSE)
if(processor MATCHES "^(x86_64|amd64)$" AND NOT CMAKE_OSX_ARCHITECTURES MATCHES "arm64")
    set(x86 TRUE)
endif()

if(MSVC)
    set(avx2_flags /arch:AVX2)
    set(avx512_flags /arch:AVX512)
    set(cpu_flags /O2 /fp:precise)
else()
    set(avx2_flags -mavx2 -mfma -mf16c)
    set(avx512_flags -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c)
    # No contraction: a*b+c rounds twice wherever the source does not ask for an fma, so that every
    # instruction set rounds alike.
    set(cpu_flags -O3 -ffp-contract=off -Wall -Wextra)
endif()

foreach(source ${cpu_sources})
    get_filename_component(name "${source}" NAME)
    set(flags ${cpu_flags})
    if(name MATCHES "_(avx2|avx512)[a-z_]*\\.cpp$")
        if(x86)
            list(APPEND flags ${${CMAKE_MATCH_1}_flags})
        else()
            set_source_files_properties("${source}" PROPERTIES HEADER_FILE_ONLY TRUE)
        endif()
    endif()
    set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
endforeach()
if(x86)
    target_compile_definitions(nibble_kernels PRIVATE NIBBLE_X86)
endif()

if(NIBBLE_SANITIZE)
    target_compile_options(nibble_kernels PRIVATE
                           -fsanitize=address,undefined -fno-sanitize-recover=undefined
                           -fno-omit-frame-pointer -g)
    target_link_options(nibble_kernels PRIVATE -fsanitize=address,undefined)
endif()
if(NIBBLE_STATIC_STDCXX AND UNIX AND NOT APPLE)
    target_link_options(nibble_kernels PRIVATE -static-libstdc++ -static-libgcc)
endif()
