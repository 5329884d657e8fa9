# SPDX-License-Identifier: Apache-2.0
#
# Finds what a program that runs engines links with: the user's own first, else the pip packages in
# requirements/toolchain.txt and tensorrt-rtx-cu13-libs.

# lynx_find_dependencies([BUILD]): makes LynxCompile::tensorrt and LynxCompile::cudart of LYNX_TENSORRT_LIBRARY and
# LYNX_CUDART_STATIC (with the headers in LYNX_CUDA_INCLUDE_DIR); with BUILD it looks for these and for
# LYNX_JSON_INCLUDE_DIR, which the library itself is built with. Stops with what to install.
macro(lynx_find_dependencies)
  find_package(Threads REQUIRED)
  if("${ARGV0}" STREQUAL "BUILD")
    lynx_find_files()
  endif()
  foreach(file IN ITEMS LYNX_TENSORRT_LIBRARY LYNX_CUDART_STATIC LYNX_CUDA_INCLUDE_DIR)
    if(NOT EXISTS "${${file}}")
      message(FATAL_ERROR "LynxCompile: '${${file}}' does not exist: point to it with -D${file}=.")
    endif()
  endforeach()
  if(NOT TARGET LynxCompile::tensorrt)
    add_library(LynxCompile::tensorrt SHARED IMPORTED)
    set_target_properties(LynxCompile::tensorrt PROPERTIES IMPORTED_LOCATION "${LYNX_TENSORRT_LIBRARY}")
    add_library(LynxCompile::cudart STATIC IMPORTED)
    set_target_properties(LynxCompile::cudart PROPERTIES IMPORTED_LOCATION "${LYNX_CUDART_STATIC}"
                                                         INTERFACE_INCLUDE_DIRECTORIES "${LYNX_CUDA_INCLUDE_DIR}")
    set_property(TARGET LynxCompile::cudart PROPERTY INTERFACE_LINK_LIBRARIES Threads::Threads ${CMAKE_DL_LIBS} rt)
  endif()
endmacro()

function(lynx_find_files)
  find_package(Python COMPONENTS Interpreter REQUIRED)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import sys; print(';'.join(p for p in sys.path if p))"
                  OUTPUT_VARIABLE python_path OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(cuda /usr/local/cuda /usr/local/cuda/targets/${CMAKE_SYSTEM_PROCESSOR}-linux)
  if(DEFINED ENV{CUDA_HOME})
    list(PREPEND cuda $ENV{CUDA_HOME})
  endif()
  lynx_find(LYNX_CUDA_INCLUDE_DIR PATH "CUDA's headers" cuda_runtime_api.h
            "${cuda};${python_path}" "include;nvidia/cu13/include")
  lynx_find(LYNX_CUDART_STATIC FILE "The static CUDA runtime" libcudart_static.a
            "${cuda};${python_path}" "lib64;lib;nvidia/cu13/lib")
  lynx_find(LYNX_JSON_INCLUDE_DIR PATH "nlohmann's JSON" nlohmann/json.hpp
            "/usr/include;${python_path}" ".;nlohmann_json/include")
  if(LYNX_BACKEND STREQUAL "tensorrt_rtx")
    lynx_find(LYNX_TENSORRT_LIBRARY FILE "TensorRT for RTX" "libtensorrt_rtx.so;libtensorrt_rtx.so.1"
              "/usr/lib;${python_path}" "${CMAKE_SYSTEM_PROCESSOR}-linux-gnu;tensorrt_rtx_libs")
  elseif(LYNX_BACKEND STREQUAL "tensorrt")
    lynx_find(LYNX_TENSORRT_LIBRARY FILE "TensorRT" "libnvinfer.so;libnvinfer.so.11;libnvinfer.so.10"
              "/usr/lib;${python_path}" "${CMAKE_SYSTEM_PROCESSOR}-linux-gnu;tensorrt_libs")
  else()
    message(FATAL_ERROR "LYNX_BACKEND is '${LYNX_BACKEND}': give tensorrt_rtx or tensorrt.")
  endif()
endfunction()

function(lynx_find variable kind what names paths suffixes)
  if(kind STREQUAL "PATH")
    find_path(${variable} ${names} PATHS ${paths} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
  else()
    find_file(${variable} NAMES ${names} PATHS ${paths} PATH_SUFFIXES ${suffixes} NO_DEFAULT_PATH)
  endif()
  if(NOT ${variable})
    message(FATAL_ERROR "${what} (${names}) was not found: run `pip install --no-deps -r requirements/toolchain.txt "
                        "tensorrt-rtx-cu13-libs`, or point to your own with -D${variable}=.")
  endif()
  message(STATUS "lynx: ${what}: ${${variable}}")
endfunction()
