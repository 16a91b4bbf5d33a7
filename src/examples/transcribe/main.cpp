// SPDX-License-Identifier: Apache-2.0
#include "transcribe/commands.h"

int main(int argc, char** argv) {
  return transcribe::run(argc, argv);
}
