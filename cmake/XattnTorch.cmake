# SPDX-License-Identifier: Apache-2.0
#
# Finds LibTorch and gives its imported target `torch`. Serves the build and, installed beside xattn-config.cmake, the package.

cmake_policy(VERSION 3.25)  # for this file alone: a project that calls find_package may have older ones

set(XATTN_TORCH_OLDEST 2.7)   # wheels before it use the old string ABI
set(XATTN_TORCH_TESTED 2.7 2.12 2.13 2.14 2.15)  # a list: the minors on which the suite has run

# Looks for LibTorch, unless the project already has a target `torch`, in this order:
#   1. Torch_DIR and CMAKE_PREFIX_PATH, as variables of CMake or of the environment
#   2. the torch of the active Python, `python3`
#   3. the torch of the virtual environment VENV; where there is none, the command INSTALLER may make it
#   4. the folder HINT
# An unsuitable place is skipped with a line that gives the reason. A package was BUILT_WITH one version and accepts no other
# major.minor; there a wrong LibTorch of the user's own choice (1.) is an error.
#
# Sets XATTN_TORCH_VERSION, XATTN_TORCH_KIND (CPU or CUDA) and XATTN_TORCH_DIR (which holds TorchConfig.cmake), or else
# XATTN_TORCH_ERROR, a text.
function(xattn_find_torch)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "BUILT_WITH;VENV;INSTALLER;HINT" "")
  set(dir "")
  set(passed_over "")

  if(TARGET torch)
    _xattn_try("the project's own find_package(Torch)" "${Torch_DIR}")
  else()
    if(Torch_DIR AND NOT Torch_DIR STREQUAL "$CACHE{XATTN_TORCH_FOUND}")  # otherwise an earlier run found it
      _xattn_try("Torch_DIR" "${Torch_DIR}")
    endif()
    if(DEFINED ENV{Torch_DIR})
      _xattn_try("the environment's Torch_DIR" "$ENV{Torch_DIR}")
    endif()
    string(REPLACE ":" ";" environment "$ENV{CMAKE_PREFIX_PATH}")
    foreach(prefix IN LISTS CMAKE_PREFIX_PATH environment)
      foreach(suffix IN ITEMS share/cmake/Torch Torch)
        if(EXISTS "${prefix}/${suffix}/TorchConfig.cmake")
          _xattn_try("CMAKE_PREFIX_PATH" "${prefix}/${suffix}")
        endif()
      endforeach()
    endforeach()
    if(NOT (arg_BUILT_WITH AND passed_over))
      _xattn_try_python("the active Python" python3)
      if(arg_VENV)
        _xattn_try_python("the project's .venv" "${arg_VENV}/bin/python")
      endif()
      if(arg_INSTALLER AND NOT dir)
        message(NOTICE "${passed_over}")
        set(passed_over "")
        execute_process(COMMAND "${arg_INSTALLER}")
        _xattn_try_python("the project's .venv" "${arg_VENV}/bin/python")
      endif()
      if(arg_HINT)
        _xattn_try("where it was when xattn was built" "${arg_HINT}")
      endif()
    endif()
  endif()

  if(NOT dir)
    set(error "No LibTorch of version ${XATTN_TORCH_OLDEST} or newer.")
    set(cure "Give -DTorch_DIR= the folder of its TorchConfig.cmake, or activate a Python that has torch")
    if(arg_BUILT_WITH)
      set(error "xattn was built with LibTorch ${arg_BUILT_WITH} and works with no other major.minor.")
    else()
      string(APPEND cure "; scripts/build.sh installs it into .venv")
    endif()
    set(XATTN_TORCH_ERROR "${error}\n${passed_over}${cure}." PARENT_SCOPE)
    return()
  endif()

  set(level STATUS)
  if(CMAKE_FIND_PACKAGE_NAME AND ${CMAKE_FIND_PACKAGE_NAME}_FIND_QUIETLY)
    set(level DEBUG)
  elseif(PROJECT_IS_TOP_LEVEL AND NOT arg_BUILT_WITH)
    set(level NOTICE)
  endif()
  message(${level} "${passed_over}LibTorch ${version} (${kind}) from ${place}")
  if(NOT minor IN_LIST XATTN_TORCH_TESTED)
    message(WARNING "xattn's tests have run with LibTorch ${XATTN_TORCH_TESTED}, but not with ${minor}.")
  endif()

  if(NOT TARGET torch)
    if(kind STREQUAL "CUDA" AND NOT DEFINED XATTN_TORCH_FROM_WHEEL)
      set(XATTN_TORCH_FROM_WHEEL ON)
    endif()
    cmake_path(SET root NORMALIZE "${dir}/../../..")
    if(XATTN_TORCH_FROM_WHEEL)
      _xattn_import_torch("${root}")
    else()
      list(PREPEND CMAKE_PREFIX_PATH "${root}/share/cmake" "${root}")  # the root too, else a libc10 of the distribution wins
      set(kineto_LIBRARY "unused")  # TorchConfig.cmake warns when the wheel has none, and it is not needed
      find_package(Torch REQUIRED GLOBAL PATHS "${dir}" NO_DEFAULT_PATH)
    endif()
    set(Torch_DIR "${dir}" CACHE PATH "The folder that holds TorchConfig.cmake" FORCE)
    if(NOT place MATCHES "^Torch_DIR")
      set(XATTN_TORCH_FOUND "${dir}" CACHE INTERNAL "What Torch_DIR is unless the user sets it")
    endif()
  endif()
  set(XATTN_TORCH_ERROR "" PARENT_SCOPE)
  set(XATTN_TORCH_VERSION "${version}" PARENT_SCOPE)
  set(XATTN_TORCH_KIND "${kind}" PARENT_SCOPE)
  set(XATTN_TORCH_DIR "${dir}" PARENT_SCOPE)
endfunction()

# Unless the caller has `dir` already: sets its dir, place, version, minor and kind, or adds a line to its passed_over.
function(_xattn_try name candidate)
  if(dir)
    return()
  endif()
  set(reason "")
  if(EXISTS "${candidate}/TorchConfig.cmake")
    include("${candidate}/TorchConfigVersion.cmake")
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor "${PACKAGE_VERSION}")
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" built_with_minor "${arg_BUILT_WITH}")
    if(arg_BUILT_WITH AND NOT minor STREQUAL built_with_minor)
      set(reason "it has LibTorch ${PACKAGE_VERSION}")
    elseif(minor VERSION_LESS XATTN_TORCH_OLDEST)
      set(reason "its LibTorch ${PACKAGE_VERSION} is older than ${XATTN_TORCH_OLDEST}")
    endif()
  else()
    set(reason "it has no LibTorch")
  endif()
  if(reason)
    set(passed_over "${passed_over}Passed over ${name}: ${reason}.\n" PARENT_SCOPE)
    return()
  endif()
  set(kind CPU)
  if(EXISTS "${candidate}/../../../lib/libtorch_cuda.so")
    set(kind CUDA)
  endif()
  set(dir "${candidate}" PARENT_SCOPE)
  set(place "${name}" PARENT_SCOPE)
  set(version "${PACKAGE_VERSION}" PARENT_SCOPE)
  set(minor "${minor}" PARENT_SCOPE)
  set(kind "${kind}" PARENT_SCOPE)
endfunction()

# The same for the torch of a Python, found without importing it.
macro(_xattn_try_python name python)
  if(NOT dir)
    execute_process(
      COMMAND "${python}" -c "import importlib.util as u; s = u.find_spec('torch'); s and print(s.submodule_search_locations[0])"
      WORKING_DIRECTORY "${CMAKE_CURRENT_FUNCTION_LIST_DIR}"
      OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    _xattn_try("${name}" "${package}/share/cmake/Torch")
  endif()
endmacro()

# Makes the imported targets of LibTorch from its own list of libraries. find_package(Torch) does that too, but with a CUDA
# build it first looks for a CUDA toolkit and stops without one, though only CUDA sources need it. The other targets in the list
# (the toolkit, MKL) are inside the wheel's libraries or found by them, so empty targets of these names suffice. A project that
# needs the real ones calls find_package(Torch) before it adds xattn, or sets XATTN_TORCH_FROM_WHEEL to OFF.
function(_xattn_import_torch root)
  set(targets_file "${root}/share/cmake/Caffe2/Caffe2Targets.cmake")
  file(STRINGS "${targets_file}" lines REGEX "INTERFACE_LINK_LIBRARIES|foreach\\(_target ")
  string(REGEX MATCHALL "[A-Za-z0-9_]+::[A-Za-z0-9_-]+" elsewhere "${lines}")
  foreach(target IN LISTS elsewhere)
    if(NOT TARGET ${target})
      add_library(${target} INTERFACE IMPORTED GLOBAL)
    endif()
  endforeach()

  get_property(before DIRECTORY PROPERTY IMPORTED_TARGETS)
  include("${targets_file}")
  get_property(targets DIRECTORY PROPERTY IMPORTED_TARGETS)
  list(REMOVE_ITEM targets ${before})
  set_property(TARGET ${targets} PROPERTY IMPORTED_GLOBAL TRUE)

  file(STRINGS "${root}/share/cmake/Torch/TorchConfig.cmake" abi REGEX "_GLIBCXX_USE_CXX11_ABI=[01]")
  string(REGEX MATCH "_GLIBCXX_USE_CXX11_ABI=[01]" abi "${abi}")
  set_target_properties(torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${root}/include;${root}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "${abi}")
endfunction()
