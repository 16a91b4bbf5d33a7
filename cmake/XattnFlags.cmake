# SPDX-License-Identifier: Apache-2.0

# The flags of our own targets. All are private: none reaches a user.
function(xattn_set_flags target)
  set_target_properties(${target} PROPERTIES
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden  # LibTorch exports enough symbols to clash with
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
    COMPILE_WARNING_AS_ERROR ${XATTN_WERROR})
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(XATTN_SANITIZE)
    set(sanitize -fsanitize=${XATTN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
    target_compile_options(${target} PRIVATE ${sanitize})
    target_link_options(${target} PRIVATE ${sanitize})
  endif()
endfunction()

# What nearly every file includes, and what takes most of the time of its compilation: for targets of many files. More headers
# may follow.
function(xattn_precompile_headers target)
  target_precompile_headers(${target} PRIVATE <torch/nn/cloneable.h> <torch/nn/modules/linear.h> <torch/utils.h> ${ARGN})
endfunction()
