// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Read by CMakeLists.txt. Follows semantic versioning from 1.0.0 on; before that, a minor release may break compatibility.
#define XATTN_VERSION_MAJOR 0
#define XATTN_VERSION_MINOR 2
#define XATTN_VERSION_PATCH 0
