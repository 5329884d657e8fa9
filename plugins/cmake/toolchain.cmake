# SPDX-License-Identifier: Apache-2.0
#
# Finds nvcc, CUTLASS and the TensorRT headers: the user's own first, else those of the pip packages in
# requirements/toolchain.txt. Sets LYNX_NVCC, LYNX_CUDA_INCLUDE_DIR, LYNX_CUDART_STATIC, LYNX_CUTLASS_DIR and
# LYNX_TENSORRT_INCLUDE_DIR, or stops with what to install.
#
# nvcc is called by custom commands (lynx_cuda_objects) instead of CMake's CUDA language, whose compiler test
# expects a toolkit's directory layout and fails on the wheels'.

set(LYNX_TOOLCHAIN_HINT "pip install --no-deps -r requirements/toolchain.txt")

function(lynx_need variable what option)
  if(NOT ${variable})
    message(FATAL_ERROR "${what} was not found: run `${LYNX_TOOLCHAIN_HINT}`, or point to your own with ${option}.")
  endif()
  message(STATUS "lynx: ${what}: ${${variable}}")
endfunction()

find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import sys; print(';'.join(p for p in sys.path if p))"
  OUTPUT_VARIABLE LYNX_PYTHON_PATH
  OUTPUT_STRIP_TRAILING_WHITESPACE)

# nvcc: -DLYNX_NVCC, $CUDACXX, PATH, /usr/local/cuda, pip.
if(NOT LYNX_NVCC)
  set(LYNX_NVCC $ENV{CUDACXX})
endif()
find_program(LYNX_NVCC nvcc PATHS /usr/local/cuda/bin NO_CACHE)
find_program(LYNX_NVCC nvcc PATHS ${LYNX_PYTHON_PATH} PATH_SUFFIXES nvidia/cu13/bin NO_CACHE NO_DEFAULT_PATH)
lynx_need(LYNX_NVCC "The CUDA compiler (nvcc)" "CUDACXX or -DLYNX_NVCC=")

# nvcc itself says where its toolkit lies; the command may be a wrapper script elsewhere.
execute_process(COMMAND ${LYNX_NVCC} --dryrun -x cu -c /dev/null ERROR_VARIABLE LYNX_NVCC_DRYRUN OUTPUT_QUIET)
if(NOT LYNX_NVCC_DRYRUN MATCHES "TOP=([^\n]*)")
  message(FATAL_ERROR "${LYNX_NVCC} does not run: run `${LYNX_TOOLCHAIN_HINT}`, or point CUDACXX to a working nvcc.")
endif()
get_filename_component(LYNX_CUDA_ROOT "${CMAKE_MATCH_1}" REALPATH)
set(LYNX_CUDA_TARGET targets/${CMAKE_SYSTEM_PROCESSOR}-linux)
find_path(LYNX_CUDA_INCLUDE_DIR cuda_runtime_api.h PATHS ${LYNX_CUDA_ROOT} PATH_SUFFIXES
          include ${LYNX_CUDA_TARGET}/include NO_DEFAULT_PATH)
lynx_need(LYNX_CUDA_INCLUDE_DIR "The CUDA runtime's header (cuda_runtime_api.h)" "-DLYNX_CUDA_INCLUDE_DIR=")
find_file(LYNX_CUDART_STATIC libcudart_static.a PATHS ${LYNX_CUDA_ROOT} PATH_SUFFIXES
          lib64 lib ${LYNX_CUDA_TARGET}/lib NO_DEFAULT_PATH)
lynx_need(LYNX_CUDART_STATIC "The static CUDA runtime (libcudart_static.a)" "-DLYNX_CUDART_STATIC=")

find_path(LYNX_CUTLASS_DIR include/cutlass/cutlass.h PATHS ${LYNX_PYTHON_PATH} PATH_SUFFIXES cutlass_library/source
          NO_DEFAULT_PATH)
lynx_need(LYNX_CUTLASS_DIR "CUTLASS 4.2" "-DLYNX_CUTLASS_DIR=")

find_path(LYNX_TENSORRT_INCLUDE_DIR NvInferRuntime.h)
if(NOT LYNX_TENSORRT_INCLUDE_DIR)
  find_path(LYNX_TENSORRT_INCLUDE_DIR NvInferRuntime.h PATHS ${LYNX_PYTHON_PATH} PATH_SUFFIXES
            kernel_lens/include/tensorrt NO_DEFAULT_PATH)
endif()
lynx_need(LYNX_TENSORRT_INCLUDE_DIR "The TensorRT headers (10.x or 11.x)" "-DLYNX_TENSORRT_INCLUDE_DIR=")

set(LYNX_NVCC_FLAGS
    -std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr --expt-extended-lambda -Xcompiler=-fPIC,-fvisibility=hidden
    -I${LYNX_CUTLASS_DIR}/include -I${LYNX_CUTLASS_DIR}/tools/util/include)

# The kernels exist for many GPUs, ranks and types: uncompressed they take tens of megabytes.
execute_process(COMMAND ${LYNX_NVCC} --help OUTPUT_VARIABLE LYNX_NVCC_HELP ERROR_QUIET)
if(LYNX_NVCC_HELP MATCHES "--compress-mode")
  list(APPEND LYNX_NVCC_FLAGS -compress-mode=size)
endif()

# lynx_join(<sources> <name>): makes them one source, for where reading CUTLASS takes longer than what each adds to it.
function(lynx_join sources name)
  list(TRANSFORM ${sources} REPLACE "(.+)" "#include \"\\1\"\n" OUTPUT_VARIABLE lines)
  list(JOIN lines "" content)
  set(joined ${CMAKE_CURRENT_BINARY_DIR}/joined/${name})
  file(CONFIGURE OUTPUT ${joined} CONTENT "${content}")
  set(${sources} ${joined} PARENT_SCOPE)
endfunction()

# lynx_cuda_objects(<out> ARCHITECTURES <80;...> [PTX <80>] SOURCES <file>...): compiles each source for the
# architectures and for PTX, from which drivers make code for any later GPU. <out> becomes the list of object files.
function(lynx_cuda_objects out)
  cmake_parse_arguments(arg "" "PTX" "ARCHITECTURES;SOURCES" ${ARGN})
  set(gencode)
  if(arg_PTX)
    list(APPEND gencode -gencode=arch=compute_${arg_PTX},code=compute_${arg_PTX})
  endif()
  foreach(arch IN LISTS arg_ARCHITECTURES)
    list(APPEND gencode -gencode=arch=compute_${arch},code=sm_${arch})
  endforeach()
  set(objects)
  foreach(source IN LISTS arg_SOURCES)
    get_filename_component(path ${source} ABSOLUTE)
    string(REPLACE ${CMAKE_CURRENT_BINARY_DIR}/ "" source ${source})
    set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${source}.o)
    get_filename_component(directory ${object} DIRECTORY)
    file(MAKE_DIRECTORY ${directory})
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${LYNX_NVCC} ${LYNX_NVCC_FLAGS} ${gencode} -I${CMAKE_CURRENT_SOURCE_DIR} -I${CMAKE_SOURCE_DIR} -MD -MF ${object}.d -c
              ${path} -o ${object}
      DEPENDS ${path}
      DEPFILE ${object}.d
      COMMENT "nvcc ${source}"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  set(${out} ${objects} PARENT_SCOPE)
endfunction()
