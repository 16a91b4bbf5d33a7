# SPDX-License-Identifier: Apache-2.0

# Adds sources to a target. Nearly all of a file's compile time goes into parsing LibTorch's headers, so with XATTN_UNITY the
# files of one GROUP are compiled as one; a file with flags of its own is compiled alone.
function(xattn_sources target group)
  target_sources(${target} PRIVATE ${ARGN})
  set_source_files_properties(${ARGN} TARGET_DIRECTORY ${target} PROPERTIES UNITY_GROUP ${group})
endfunction()

# The flags of our own targets. All are private: none reaches a user.
function(xattn_set_flags target)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden  # LibTorch exports symbols that ours could clash with
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
    COMPILE_WARNING_AS_ERROR ${XATTN_WERROR})
  if(XATTN_UNITY)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)
  endif()
  # A parent's -ffast-math or -Ofast would fold away roundings that results rest on, and lose NaN and infinity. These flags
  # follow CMAKE_CXX_FLAGS and the directory's options; a flag switched on by its own name is only off by that name.
  target_compile_options(${target} PRIVATE -Wall -Wextra
    -fno-fast-math -fno-unsafe-math-optimizations -fno-associative-math -fno-reciprocal-math -fno-finite-math-only -fsigned-zeros)
  if(XATTN_SANITIZE)
    set(sanitize -fsanitize=${XATTN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
    target_compile_options(${target} PRIVATE ${sanitize})
    target_link_options(${target} PRIVATE ${sanitize})
  endif()
endfunction()

# Precompiles the headers that nearly every file of a target includes, where files are compiled one by one.
function(xattn_precompile_headers target)
  if(NOT XATTN_UNITY AND NOT CMAKE_UNITY_BUILD)
    target_precompile_headers(${target} PRIVATE ${ARGN})
  endif()
endfunction()

# Adds a program of ours from the files of one group, in the build folder itself.
function(xattn_add_program target)
  add_executable(${target})
  xattn_sources(${target} ${target} ${ARGN})
  target_link_libraries(${target} PRIVATE xattn::xattn program xattn_fmt)
  set_target_properties(${target} PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}
    INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};$<TARGET_FILE_DIR:torch>")
  xattn_set_flags(${target})
endfunction()
