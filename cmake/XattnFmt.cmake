# SPDX-License-Identifier: Apache-2.0

# The target xattn_fmt: the headers of fmt, used without its library. LibTorch ships them (2.13 does, 2.7 does not), in front of
# all others; otherwise they are those of an installed fmt, or fetched. Without a network, FETCHCONTENT_SOURCE_DIR_FMT names a copy.
add_library(xattn_fmt INTERFACE)
target_compile_definitions(xattn_fmt INTERFACE FMT_HEADER_ONLY=1)
if(NOT EXISTS "${XATTN_TORCH_DIR}/../../../include/fmt/format.h")
  include(FetchContent)
  FetchContent_Declare(fmt
    GIT_REPOSITORY https://github.com/fmtlib/fmt
    GIT_TAG 407c905e45ad75fc29bf0f9bb7c5c2fd3475976f  # 12.1.0
    EXCLUDE_FROM_ALL
    FIND_PACKAGE_ARGS)
  FetchContent_MakeAvailable(fmt)
  target_link_libraries(xattn_fmt INTERFACE fmt::fmt-header-only)
endif()
