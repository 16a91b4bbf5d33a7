# SPDX-License-Identifier: Apache-2.0

# Makes a text FILE a constant of TARGET: for page.html, `#include "page.html.h"` gives it as CONSTANT. It may have up to 64 KiB,
# the length of a string that every compiler takes.
function(xattn_embed target file constant)
  cmake_path(ABSOLUTE_PATH file)
  cmake_path(GET file FILENAME name)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${file}")
  file(READ "${file}" text)
  string(LENGTH "${text}" length)
  if(length GREATER 65535)
    message(FATAL_ERROR "${file} has ${length} bytes, too many for a string constant.")
  endif()
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/embedded")
  file(CONFIGURE OUTPUT "${folder}/${name}.h" @ONLY CONTENT [[
// Made from @name@.
#pragma once

inline constexpr char @constant@[] = R"embedded(@text@)embedded";
]])
  target_include_directories(${target} PRIVATE "${folder}")
endfunction()
