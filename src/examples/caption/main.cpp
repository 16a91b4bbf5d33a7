// SPDX-License-Identifier: Apache-2.0
#include "caption/commands.h"

int main(int argc, char** argv) {
  return caption::run(argc, argv);
}
